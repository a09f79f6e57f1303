"""Explanations: which training patches every pixel of a sample came from."""
