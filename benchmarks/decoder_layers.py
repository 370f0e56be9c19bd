"""Processor time of a target's pass on a CPU: layers of treeflash's own against transformers'.

    python -m benchmarks.decoder_layers
    python -m benchmarks.decoder_layers gemma3_text qwen3_moe --dtypes bfloat16 --rounds 25

Each family is a random model of 8 layers and 768 hidden numbers with 32,000 tokens. A pass has 1,
16 or 64 rows: a draft tree after a prompt. Passes of both targets are run alternately in one
thread, and the medians of its processor time are compared. The difference is the largest one of the
trees' logits, relative to the largest logit.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
from treeflash_cuda.backend import CudaBackend
from treeflash_cuda.decoder.families import FAMILIES
from treeflash_cuda.target_loading import load_target

from benchmarks.common import Parser, Row, layers_of_transformers, show, write_json
from treeflash.cli.console import guarded
from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.tree import DraftTree

VOCABULARY, PROMPT, COUNTS = 32_000, 200, (1, 16, 64)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
EXPERTS = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
DELTA_NET = {
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 128}
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "granite": {"attention_multiplier": 0.125, "residual_multiplier": 0.22},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": DELTA_NET | EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen3_next": DELTA_NET | EXPERTS,
}
"""What families have besides, so that all their facts are used."""


def write(folder: Path, family: str) -> None:
    """Save a random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | SETTINGS.get(family, {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def target_of(folder: Path, dtype: str, *, own: bool) -> CudaBackend:
    """Load a target with layers of our own, or the model of transformers."""
    config = LoadConfig(device="cpu", dtype=dtype, threads=1)
    if own:
        return CudaBackend(load_target(folder, config, pack=True), None, None)
    with layers_of_transformers():
        return CudaBackend(load_target(folder, config, pack=True), None, None)


def tree_of(nodes: int) -> DraftTree:
    """Return a random tree whose paths have about a third of its nodes."""
    rng = np.random.default_rng(nodes)
    parents = [-1, *(int(rng.integers(max(0, n - 4), n)) for n in range(1, nodes))]
    tokens = rng.integers(0, VOCABULARY, nodes).astype(np.int32)
    return DraftTree.from_parents(tokens, np.array(parents, np.int32))


@torch.inference_mode()
def compare(family: str, dtype: str, rounds: int) -> Row:
    """Measure one family in one dtype."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), family)
        backends = [target_of(Path(folder), dtype, own=own) for own in (False, True)]
        states = [backend.open(PROMPT + 2 * max(COUNTS), drafts=False) for backend in backends]
        prompt = np.random.default_rng(1).integers(0, VOCABULARY, PROMPT).tolist()
        for backend, state in zip(backends, states, strict=True):
            backend.verifier.run([Prefill(state, prompt, None)])
        row: Row = {"family": family, "dtype": dtype, "layers": backends[1].target.layers_from}
        difference = 0.0
        for count in COUNTS:
            tree = tree_of(count)
            times: tuple[list[float], list[float]] = [], []
            found: list[torch.Tensor] = []
            for turn in range(rounds + 2):  # the first two warm up
                found = []
                for taken, backend, state in zip(times, backends, states, strict=True):
                    start = time.thread_time()
                    (logits,) = backend.verifier.forward([(state, tree)], [True]).logits.parts
                    if turn > 1:
                        taken.append(time.thread_time() - start)
                    found.append(logits.float())
            old, new = (1e3 * median(taken) for taken in times)
            row[f"{count} rows, ms"] = f"{old:.2f} / {new:.2f}"
            row[f"{count} rows, ratio"] = f"{new / old:.2f}"
            largest = (found[1] - found[0]).abs().max() / found[0].abs().max()
            difference = max(difference, float(largest))
        for state in states:
            state.close()
    return row | {"difference": f"{difference:.1e}"}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = Parser(__doc__)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], metavar="TYPE")
    parser.add_list("--dtypes", str, ("float32", "bfloat16"), "dtypes of the weights", "NAME,...")
    parser.add_number("--rounds", 15, "passes of each kind")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    # Types that also read images have the layers of others.
    alone = (x for x in FAMILIES if "text_config" not in CONFIG_MAPPING[x].sub_configs)
    names = args.families or list(alone)
    rows = [compare(name, dtype, args.rounds) for name in names for dtype in args.dtypes]
    show("a pass with transformers' layers / with our own", rows)
    write_json(args.json, "decoder_layers", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
