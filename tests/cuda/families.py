"""Try every causal model type of transformers, tiny and random, and print which can branch.

    python tests/cuda/families.py [model_type ...]

A type is `verified` when a random tree, after a prefix longer than any sliding window, has the
logits of its paths run as plain text, and those of transformers' own attention; `refused` when
loading or the probe raises an error that says why. `not tried` means that this script's generic
configuration does not make such a model.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import logging
from treeflash_cuda.backend import CudaBackend
from treeflash_cuda.target import Target

from treeflash.config import SamplingConfig
from treeflash.decoding.probe import tree_difference
from treeflash.decoding.tree import DraftTree
from treeflash.errors import TreeflashError, UnsupportedModelError

WINDOW = 8
PREFIX = 24
TOLERANCE = 1e-4
LAYERS = 4

# Keys of configurations, and values that make a small model; a type ignores what it does not know.
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "query_pre_attn_scalar": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main(names: list[str]) -> None:
    """Print a line per model type, and the totals."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    outcomes: dict[str, list[str]] = {}
    for name in names or model_types():
        outcome, why = attempt(name)
        outcomes.setdefault(outcome, []).append(name)
        print(f"{name:24} {outcome:10} {why}", flush=True)
    for outcome, of_it in sorted(outcomes.items()):
        print(f"\n{outcome}: {len(of_it)}\n  {', '.join(of_it)}")


def model_types() -> list[str]:
    """Types that `AutoModelForCausalLM` can make."""
    return sorted(
        name for name, kind in CONFIG_MAPPING.items() if kind in MODEL_FOR_CAUSAL_LM_MAPPING
    )


def attempt(name: str) -> tuple[str, str]:
    """(verified, refused or not tried; how exactly or why)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = write(Path(folder), name)
            expected = plain_logits(model)
        except Exception as error:
            return "not tried", f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:100]
        try:
            target = Target(Path(folder), torch.device("cpu"), torch.float32)
            target.prepare(pack=True)
            backend = CudaBackend(target, None, None, None)
            error = tree_difference(backend, np.random.default_rng(0), PREFIX)
            error = max(error, difference(backend, expected))
        except UnsupportedModelError as error:
            return "refused", str(error)[:100]
        except TreeflashError as error:
            return "not tried", str(error)[:100]
        except Exception as error:  # what `check_trees` makes a refusal of
            return "refused", f"probe: {type(error).__name__}: {str(error)[:80]}"
    if error > TOLERANCE:
        return "refused", f"probe: differs by {error:.1e}"
    return "verified", f"{error:.0e}"


def write(folder: Path, name: str) -> Any:
    """Save a random model of that type, and load it again as transformers does."""
    kind = CONFIG_MAPPING[name]
    text = kind.sub_configs.get("text_config")
    config = kind(text_config=SMALL) if text else configure(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 10_000_000:
        raise ValueError("this type has sizes of its own and came out large")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:  # sharp attention: a uniform one would hide wrong positions and masks
                sharp = 1.0 if "embed" in path else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, sharp)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def configure(kind: Any) -> Any:
    """A small configuration; layer types are left to the type where it has other ones."""
    try:
        return kind(**SMALL)
    except Exception:
        return kind(**{key: value for key, value in SMALL.items() if key != "layer_types"})


def tokens() -> list[int]:
    """A text longer than the window."""
    return np.random.default_rng(1).integers(0, 96, PREFIX).tolist()


def plain_logits(model: Any) -> np.ndarray:
    """The last token's logits by transformers alone."""
    with torch.inference_mode():
        return model(torch.tensor([tokens()])).logits[0, -1].numpy()


def difference(backend: CudaBackend, expected: np.ndarray) -> float:
    """From transformers' own logits, relative to their spread."""
    verifier = backend.verifier(features=False)
    verifier.prefill(tokens()[:-1], SamplingConfig(), None)
    logits = verifier.logits(DraftTree.root_only(tokens()[-1]))[0]
    return float(np.sqrt(np.mean((logits - expected) ** 2)) / expected.std())


if __name__ == "__main__":
    main(sys.argv[1:])
