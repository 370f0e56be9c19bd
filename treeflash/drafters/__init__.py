"""Drafter checkpoints: what a drafter's folder says."""
