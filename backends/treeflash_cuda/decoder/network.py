"""The networks of a decoder's layers: one with a gate, or several that a router chooses among."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.families import NETWORK
from treeflash_cuda.decoder.operations import DecoderOperations, Weights


class Network(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        facts: DecoderFacts,
        operations: DecoderOperations,
        weights: Weights,
        place: str,
        inner: int,  # numbers between the products
        names: tuple[str, str, str] = NETWORK,
    ) -> None:
        super().__init__()
        self.operations, self.activation = operations, facts.activation
        gate, up, down = names
        self.gate_up = weights.linear(place, facts.hidden_size, **{gate: inner, up: inner})
        self.down = weights.linear(place, inner, **{down: facts.hidden_size})

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, hidden_size) rows to as many."""
        y: Tensor = self.down(self.operations.gated(self.gate_up(x), self.activation))
        return y


class ExpertNetwork(nn.Module):
    """The weighted sum of the networks that the router chooses for a row."""

    def __init__(
        self, facts: DecoderFacts, operations: DecoderOperations, weights: Weights, layer: str
    ) -> None:
        super().__init__()
        assert facts.experts is not None
        self.facts = own = facts.experts
        place = f"{layer}.{own.place}"
        self.router = weights.linear(place, facts.hidden_size, gate=own.count)
        self.experts = nn.ModuleList(
            Network(facts, operations, weights, f"{place}.experts.{n}", own.size, own.names)
            for n in range(own.count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, hidden_size) rows to as many; each row's sum has the order of its weights."""
        shares, chosen = self.router(x).float().softmax(-1).topk(self.facts.per_token)
        if self.facts.sums_to_one:
            shares = shares / shares.sum(-1, keepdim=True)
        experts, order = chosen.flatten().sort(stable=True)
        numbers, counts = experts.unique_consecutive(return_counts=True)
        rows = x.index_select(0, order // self.facts.per_token).split(counts.tolist())
        outputs = [self.experts[n](part) for n, part in zip(numbers.tolist(), rows, strict=True)]
        y = torch.cat(outputs).mul_(shares.flatten()[order, None].to(x.dtype))
        pairs = torch.empty_like(y).index_copy_(0, order, y).view(*chosen.shape, -1)
        return reduce(torch.add, pairs.unbind(1))
