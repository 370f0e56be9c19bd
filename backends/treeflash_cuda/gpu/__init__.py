"""What only a GPU runs: Triton kernels, CUDA graphs, passes of fixed shapes, tensor parallelism."""
