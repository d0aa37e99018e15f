"""Embeddings that are computed from smaller factors."""
