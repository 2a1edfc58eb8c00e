"""Parametric RAG as a library: no Ray, no web framework, works in a notebook on one passage."""
