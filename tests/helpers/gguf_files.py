"""GGUF files of tiny random Llama models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 32, 4, 2, 64, 2
HEAD_DIM = HIDDEN // HEADS
MERGES = ["Ġ t", "h e", "Ġt he", "Ċ Ċ", "1 2"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = "<|tool|>"
LAYER_SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    pre: str = "smollm",
    kind: Callable[[str], Kind] = lambda name: Kind.Q8_0,
    add: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Write a tiny random model; return the weights as they can be read back, by GGUF name.

    `pre` is the pre-tokenizer, `kind` gives the types of matrices, and `add` adds settings or
    tensors.
    """
    rng = np.random.default_rng(0)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES), USER_DEFINED]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in LAYER_SHAPES.items()}
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        own = kind(name) if len(shape) == 2 else None
        stored = values if own is None else gguf.quants.quantize(values, own)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=own)
        weights[name] = values if own is None else gguf.quants.dequantize(stored, own)
    add(writer)
    finish(writer)
    return weights


def scaling(kind: str, **settings: float) -> Callable[[gguf.GGUFWriter], None]:
    """Return an addition of stretched rotary embeddings, for `write_gguf`."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_uint32("llama.rope.scaling.original_context_length", 32)
        for name, value in settings.items():
            writer.add_float32(f"llama.rope.scaling.{name}", value)

    return add


def finish(writer: gguf.GGUFWriter) -> None:
    """Write all that was added to a file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
