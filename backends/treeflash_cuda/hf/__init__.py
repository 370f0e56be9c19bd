"""Targets that are models of transformers, loaded unmodified: their passes, masks and caches."""
