"""The MLX backend: models of mlx-lm on Apple silicon or a CPU."""

import os
import sys

TF32_MAY_BE_ON = "mlx.core" in sys.modules and "MLX_ENABLE_TF32" not in os.environ
"""Whether MLX may have read `MLX_ENABLE_TF32`, as it does at its first product, before this module
sets it."""

# Newer GPUs round float32 to fewer bits in products of many rows but not of one, so that a tree and
# plain decoding would differ as in half precision.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
