"""The library for Parametric RAG. It needs no Ray and no web framework, and works in a notebook on one passage."""
