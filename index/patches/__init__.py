"""Approximate nearest patches, and the inverted lists of all of them (FAISS)."""
