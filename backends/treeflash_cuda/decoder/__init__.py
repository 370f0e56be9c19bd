"""Layers of our own for targets, on every device."""
