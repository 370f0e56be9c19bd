"""What a training step costs: `python -m benchmarks.training_cost --shape qwen3-4b`.

The loss of one text and its gradient are computed at the published shapes with random weights, for
two numbers of anchors. PyTorch counts the operations of the matrix products and the bytes that are
kept for the gradient; both grow linearly with the anchors, so that the cost of any batch follows.
Nothing is timed: tokens per second are the operations of a step over those that a GPU does in a
second, at a given utilisation.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from treeflash_cuda.corrections import SwiGLU
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.training.batch import Batch
from treeflash_cuda.training.blocks import Blocks
from treeflash_cuda.training.lm_head import LMHead
from treeflash_cuda.training.objective import objective

from benchmarks.common import Parser, at_least_one, show, write_json
from benchmarks.random_pair import BLOCK_SIZE, DRAFTER_LAYERS, SHAPES
from treeflash.cli.exit_status import guarded
from treeflash.drafters.formats import parse_drafter_config
from treeflash.training.config import TrainConfig

FEW, MORE = 8, 16  # anchors
BYTES_PER_PARAMETER = 16  # float32 weight and gradient, and two averages of AdamW
BYTES_PER_TARGET_PARAMETER = 2  # bfloat16
PEAK = 989e12  # H100 SXM, bfloat16 without sparsity (NVIDIA H100 data sheet)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one text costs.

    Attributes:
        flops: of the drafter, forward and backward.
        kept: bytes that are kept for the gradient.
    """

    flops: float
    kept: float

    def at(self, more: Cost, anchors: int) -> Cost:
        """The cost with another number of anchors: this has `FEW`, `more` has `MORE`."""
        share = (anchors - FEW) / (MORE - FEW)
        return Cost(
            flops=self.flops + share * (more.flops - self.flops),
            kept=self.kept + share * (more.kept - self.kept),
        )


def make_blocks(shape: dict[str, Any]) -> Blocks:
    """A drafter of random weights in the published shape."""
    settings = shape | {
        "model_type": "qwen3",
        "num_hidden_layers": DRAFTER_LAYERS,
        "num_target_layers": shape["num_hidden_layers"],
        "block_size": BLOCK_SIZE,
        "dflash_config": {
            "mask_token_id": 0,
            "target_layer_ids": list(range(DRAFTER_LAYERS)),
        },
        "treeflash_config": {"ar_approximation": "swiglu"},
    }
    config = parse_drafter_config(settings)
    vocabulary = torch.zeros(shape["vocab_size"], shape["hidden_size"], dtype=torch.bfloat16)
    head = SwiGLU(config, shape["intermediate_size"])
    blocks = Blocks(
        DrafterModel(config), head, vocabulary, LMHead(SimpleNamespace(weight=vocabulary))
    )
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.02)
    return blocks


def cost(blocks: Blocks, length: int, anchors: int, config: TrainConfig) -> Cost:
    """Compute the loss of one text and its gradient once."""
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
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    owned = {p.untyped_storage().data_ptr() for p in [*blocks.parameters(), blocks.embeddings[0]]}
    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with counter, torch.autocast("cpu", torch.bfloat16):
        with hooks:
            loss, _ = objective(
                blocks, batch, shape.vocab_size or 0, config, torch.Generator().manual_seed(0)
            )
        loss.backward()
    blocks.zero_grad()
    bytes_kept = sum(size for pointer, size in kept.items() if pointer not in owned)
    return Cost(flops=counter.get_total_flops(), kept=bytes_kept)


def target_parameters(shape: dict[str, Any]) -> tuple[int, int]:
    """How many weights of the target a token is multiplied with, and how many it has."""
    h, head_dim = shape["hidden_size"], shape["head_dim"]
    q, kv = (shape[f"num_{name}_heads"] * head_dim for name in ("attention", "key_value"))
    layer = 2 * h * (q + kv) + 3 * h * shape["intermediate_size"]
    table = shape["vocab_size"] * h
    used = shape["num_hidden_layers"] * layer + table
    return used, used + (0 if shape["tie_word_embeddings"] else table)


def estimate(
    shape: dict[str, Any], length: int, texts: int, anchors: int, utilisation: float
) -> dict[str, Any]:
    """The cost of a step; see `main`."""
    torch.manual_seed(0)
    blocks = make_blocks(shape)
    config = TrainConfig()
    few, more = (cost(blocks, length, count, config) for count in (FEW, MORE))
    own = few.at(more, anchors)
    drafter = sum(parameter.numel() for parameter in blocks.parameters())
    used, target = target_parameters(shape)
    features = DRAFTER_LAYERS * shape["hidden_size"] * 2 * length
    gib = 2**30
    memory = {
        "drafter, gradient and optimiser": BYTES_PER_PARAMETER * drafter / gib,
        "target": BYTES_PER_TARGET_PARAMETER * target / gib,
        "kept for the gradient": texts * own.kept / gib,
        "features": texts * features / gib,
    }
    flops = {"drafter": texts * own.flops, "target": texts * 2 * used * length}
    seconds = sum(flops.values()) / (PEAK * utilisation)
    return {
        "parameters_of_the_drafter": drafter,
        "memory_gib": memory | {"sum": sum(memory.values())},
        "tflop": {name: value / 1e12 for name, value in flops.items()},
        "text_tokens_per_s": texts * length / seconds,
        "predicted_tokens_per_s": texts * anchors * (BLOCK_SIZE - 1) / seconds,
    }


@guarded
def main(argv: list[str] | None = None) -> int:
    """Compute the cost of a step and print it."""
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="(default: qwen3-4b)")
    for name, default, text in (
        ("length", 2048, "tokens of a text"),
        ("texts", 8, "of a forward pass"),
        ("anchors", 64, "of a text"),
    ):
        parser.add_argument(
            f"--{name}", type=at_least_one, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="of the GPU's peak (default: 0.4)"
    )
    args = parser.parse_args(argv)
    found = estimate(SHAPES[args.shape], args.length, args.texts, args.anchors, args.utilisation)
    show("memory, GiB", [found["memory_gib"]])
    show("operations of a step, 10^12", [found["tflop"]])
    rates = {"text": found["text_tokens_per_s"], "predicted": found["predicted_tokens_per_s"]}
    show("tokens per second", [{name: round(value) for name, value in rates.items()}])
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    write_json(args.json, "training_cost", {"settings": settings, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
