"""What only a CPU runs: layers of our own, kernels compiled at load, threads."""
