"""Training a drafter: interfaces, configuration, data and model card."""
