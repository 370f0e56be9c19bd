"""Drafter checkpoints: one module per published format, and what they share."""
