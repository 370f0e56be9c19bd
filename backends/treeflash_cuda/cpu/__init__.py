"""What only a CPU runs: kernels compiled at load, threads, attention with masks."""
