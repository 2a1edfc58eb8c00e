"""The HTTP API on Ray Serve: routes, API keys, limits, metrics, and the page."""
