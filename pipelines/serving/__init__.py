"""Serving answers over HTTP with Ray Serve."""
