"""The weights of conditional heads, under their names in checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from treeflash.drafter_config import DrafterConfig
from treeflash_cuda.corrections import CORRECTIONS


class SelectorWeights(nn.Module):
    """The tensors of a selector, under their names in checkpoints."""

    def __init__(self, config: DrafterConfig, vocab_size: int) -> None:
        """Make them."""
        super().__init__()
        rank = config.head_rank
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)


class MarkovWeights(nn.Module):
    """The tensors of a Markov head and its confidence head, under their names in checkpoints."""

    def __init__(self, config: DrafterConfig, vocab_size: int) -> None:
        """Make them."""
        super().__init__()
        h, rank = config.hidden_size, config.head_rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Embedding(config.draft_vocab_size or vocab_size, rank)
        if config.head == "gated":
            self.gate_proj = nn.Linear(h + rank, rank)
        if config.head == "rnn":
            self.joint_proj = nn.Linear(2 * rank + h, 3 * rank)
        if config.confidence_head:
            width = h + rank if config.confidence_with_markov else h
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(width, 1)})


class GRU(nn.Module):
    """The tensors of a GRU without biases, under PyTorch's names."""

    def __init__(self, size: int, state_size: int) -> None:
        """Make them."""
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * state_size, size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * state_size, state_size))


class DominoWeights(nn.Module):
    """The tensors of a Domino head, under their names in checkpoints."""

    def __init__(self, config: DrafterConfig, vocab_size: int) -> None:
        """Make them."""
        super().__init__()
        h, rank, g = config.hidden_size, config.head_rank, config.head_state_size
        self.prefix_gru = GRU(h, g)
        # The second one is no linear layer here: its rows are taken for some tokens alone.
        self.embed_proj = nn.ModuleDict(
            {"0": nn.Linear(h + g, rank, bias=False), "2": nn.Embedding(vocab_size, rank)}
        )


def make_module(config: DrafterConfig, head_size: int, vocab_size: int) -> nn.Module:
    """The weights of a drafter's head, to be loaded; `vocab_size` is the target's."""
    if config.head in CORRECTIONS:
        return CORRECTIONS[config.head](config, head_size)
    if config.head == "selector":
        return SelectorWeights(config, vocab_size)
    if config.head == "domino":
        return DominoWeights(config, vocab_size)
    return MarkovWeights(config, vocab_size)
