"""The memory and the operations of a training step, counted at published shapes.

    python -m benchmarks.training_cost --shape qwen3-4b [--json FILE]

The loss of one sequence and its gradient are computed with random weights, for two numbers of
anchors. PyTorch counts the operations of the matrix products and the bytes that are kept for the
gradient. Both grow linearly with the anchors, which gives the cost of any batch. Nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.heads import HEAD_CLASSES
from treeflash_cuda.training.batch import Batch
from treeflash_cuda.training.losses import objective
from treeflash_cuda.training.model import Blocks

from benchmarks.common import Parser, Row, show, write_json
from benchmarks.random_pair import BLOCK_SIZE, DRAFTER_LAYERS, SHAPES, drafter_config
from treeflash.cli.console import guarded
from treeflash.config import GIB
from treeflash.drafters.formats import parse_drafter_config
from treeflash.errors import ConfigError
from treeflash.training.config import TrainConfig

MEASURED_ANCHORS = (8, 16)
BYTES_PER_PARAMETER = 16  # float32 weight and gradient, and two averages of AdamW
BYTES_PER_TARGET_PARAMETER = 2  # bfloat16


def make_blocks(shape: Row) -> Blocks:
    """Create a drafter of random weights in the published shape."""
    config = parse_drafter_config(drafter_config(shape))
    vocabulary = torch.zeros(shape["vocab_size"], shape["hidden_size"], dtype=torch.bfloat16)
    head = HEAD_CLASSES["swiglu"](config, shape["intermediate_size"], shape["vocab_size"])
    lm_head = SimpleNamespace(weight=vocabulary)
    blocks = Blocks(DrafterModel(config), head, vocabulary, lm_head)
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.02)
    return blocks


def measure_cost(blocks: Blocks, length: int, anchors: int, config: TrainConfig) -> tuple[int, int]:
    """Compute the loss of one sequence and its gradient once.

    Returns the operations of the drafter, forward and backward, and the bytes that are kept for
    the gradient.
    """
    shape, top = blocks.model.config, config.top_tokens
    features = len(shape.target_layer_ids) * shape.hidden_size
    ones = torch.ones(1, length, top)
    batch = Batch(
        tokens=torch.ones(1, length, dtype=torch.long),
        features=torch.zeros(1, length, features, dtype=torch.bfloat16),
        anchors=torch.linspace(1, length - shape.block_size, anchors).long()[None],
        valid=torch.ones(1, anchors, shape.depths, dtype=torch.bool),
        top_tokens=torch.arange(top).expand(1, length, -1),
        top_log_probs=(ones / top).log(),
    )
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in [*blocks.parameters(), blocks.of_target[0]]}
    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with counter, torch.autocast("cpu", torch.bfloat16):
        with hooks:
            loss, _ = objective(
                blocks, batch, shape.vocab_size or 0, config, torch.Generator().manual_seed(0)
            )
        loss.backward()
    blocks.zero_grad()
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    return counter.get_total_flops(), activations


def count_target_parameters(shape: Row) -> tuple[int, int]:
    """Count the target's weights that a token is multiplied with, and all its weights."""
    h, head_dim = shape["hidden_size"], shape["head_dim"]
    q, kv = (shape[f"num_{name}_heads"] * head_dim for name in ("attention", "key_value"))
    layer = 2 * h * (q + kv) + 3 * h * shape["intermediate_size"]
    table = shape["vocab_size"] * h
    multiplied = shape["num_hidden_layers"] * layer + table
    return multiplied, multiplied + (0 if shape["tie_word_embeddings"] else table)


def compute_costs(shape: Row, length: int, sequences: int, anchors: int) -> dict[str, Any]:
    """Compute the memory and the operations of a step."""
    torch.manual_seed(0)
    blocks = make_blocks(shape)
    config = TrainConfig()
    costs = (measure_cost(blocks, length, count, config) for count in MEASURED_ANCHORS)
    low, high = MEASURED_ANCHORS
    factor = (anchors - low) / (high - low)  # the costs grow linearly
    drafter_flops, activation_bytes = (
        few + factor * (more - few) for few, more in zip(*costs, strict=True)
    )
    drafter = sum(parameter.numel() for parameter in blocks.parameters())
    multiplied, target = count_target_parameters(shape)
    memory = {
        "drafter, gradient and optimiser": BYTES_PER_PARAMETER * drafter / GIB,
        "target": BYTES_PER_TARGET_PARAMETER * target / GIB,
        "kept for the gradient": sequences * activation_bytes / GIB,
        "features": sequences * DRAFTER_LAYERS * shape["hidden_size"] * 2 * length / GIB,
    }
    flops = {"drafter": sequences * drafter_flops, "target": sequences * 2 * multiplied * length}
    return {
        "drafter_parameters": drafter,
        "memory_gib": memory | {"sum": sum(memory.values())},
        "tflop": {name: value / 1e12 for name, value in flops.items()},
    }


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Compute the cost of a step and print it."""
    options = Parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="(default: qwen3-4b)")
    options.add_number("--length", 2048, "tokens of a sequence")
    options.add_number("--sequences", 8, "sequences per forward pass")
    options.add_number("--anchors", 64, "anchors per sequence")
    args = options.parse_args(argv)
    if args.length <= BLOCK_SIZE:
        raise ConfigError(f"--length must be above the {BLOCK_SIZE} tokens of a block")
    costs = compute_costs(SHAPES[args.shape], args.length, args.sequences, args.anchors)
    show("memory, GiB", [costs["memory_gib"]])
    show("operations of a step, 10^12", [costs["tflop"]])
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    write_json(args.json, "training_cost", {"settings": settings, **costs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
