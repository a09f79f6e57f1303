"""Timed cases: each file measures one thing and writes a result file (bench/results)."""
