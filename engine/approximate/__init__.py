"""Approximate posteriors with a known error."""
