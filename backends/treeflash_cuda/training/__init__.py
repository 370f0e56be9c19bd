"""Training data and training in PyTorch."""
