"""Approximate posteriors with a known error: methods, and what they are made of."""
