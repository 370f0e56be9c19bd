"""The HTTP server: under load, and what HTTP costs."""
