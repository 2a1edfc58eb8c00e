"""Retrieval: build, store and search an index over a corpus."""
