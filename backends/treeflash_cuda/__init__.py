"""The PyTorch backend: any Hugging Face causal language model, on CUDA or a CPU."""
