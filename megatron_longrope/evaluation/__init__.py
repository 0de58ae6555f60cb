"""Perplexity and retrieval measurements, and the report that shows them."""
