"""Trained diffusion networks, and how well the score machines predict what they draw."""
