"""The MLX backend: any mlx-lm model with plain keys and values, on Apple silicon or a CPU."""
