"""Benchmarks: speed, memory and accuracy of the engine against what a user would pick instead."""
