"""Targets whose own MTP heads cannot be used decode as if they had none."""

from __future__ import annotations

import numpy as np
from byte_tokens import save_tokenizer
from families import LAYERS
from safetensors.numpy import save_file

from treeflash.language_model import load
from treeflash.testing import require

require("mlx")


def test_an_incomplete_head_of_glm_4_7_flash_is_passed_over(families, tmp_path, caplog):
    families.write(tmp_path, "glm4_moe_lite", vocab_size=300)
    save_tokenizer(tmp_path)
    layers = LAYERS
    head = {f"model.layers.{layers}.eh_proj.weight": np.zeros((2, 2), np.float32)}
    save_file(head, tmp_path / "mtp.safetensors")
    model = load(tmp_path, device="cpu", backend="mlx", dtype="float32")
    line = caplog.messages[0]
    assert f"the MTP head in {tmp_path} is skipped: {tmp_path} lacks the tensor" in line
    plain = load(tmp_path, False, device="cpu", backend="mlx", dtype="float32")
    text = model.generate("hi", max_tokens=16)
    assert text.method == "suffix"
    assert text.token_ids == plain.generate("hi", max_tokens=16, method="ar").token_ids
