"""The HTTP server under load, and tasks of lm-eval for its clients."""
