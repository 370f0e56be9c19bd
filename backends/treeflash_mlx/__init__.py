"""The MLX backend: any mlx-lm model with plain keys and values, on Apple silicon or a CPU."""

import os

# Before MLX's first operation: newer GPUs round float32 to fewer bits in products of many rows but
# not of one, so that a tree and plain decoding would differ as in half precision.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
