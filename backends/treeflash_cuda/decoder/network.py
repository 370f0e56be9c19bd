"""The networks of a decoder's layers: one with a gate, or several that a router chooses among."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.families import NETWORK
from treeflash_cuda.decoder.operations import DecoderOperations, Weights, constant
from treeflash_cuda.experts import routed


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
        places = [f"{place}.experts.{n}" for n in range(own.count)]
        make = NetworkList if operations.grouped_linear is None else JoinedNetworks
        self.experts: nn.Module = make(facts, operations, weights, places)
        self.shared: Network | None = None
        if (inner := own.shared_size) is not None:
            self.shared = Network(facts, operations, weights, f"{place}.shared_expert", inner)
            self.shared_gate = weights.linear(place, facts.hidden_size, shared_expert_gate=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, hidden_size) rows to as many; each row's sum has the order of its weights."""
        shares, chosen = self.router(x).float().softmax(-1).topk(self.facts.per_token)
        if self.facts.sums_to_one:
            shares = shares / shares.sum(-1, keepdim=True)
        y: Tensor = self.experts(x, chosen, shares.to(x.dtype))
        return y if self.shared is None else y + self.shared_gate(x).sigmoid() * self.shared(x)


class NetworkList(nn.ModuleList):
    """Experts that run one after the other, each with its rows."""

    def __init__(
        self,
        facts: DecoderFacts,
        operations: DecoderOperations,
        weights: Weights,
        places: Sequence[str],  # the places of the experts
    ) -> None:
        assert facts.experts is not None
        own = facts.experts
        super().__init__(
            Network(facts, operations, weights, place, own.size, own.names) for place in places
        )

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Return the weighted sums of (n, k) experts of the rows."""
        experts, order = chosen.flatten().sort(stable=True)
        numbers, counts = experts.unique_consecutive(return_counts=True)
        rows = x.index_select(0, order // chosen.shape[1]).split(counts.tolist())
        outputs = [self[n](part) for n, part in zip(numbers.tolist(), rows, strict=True)]
        y = torch.cat(outputs).mul_(shares.flatten()[order, None])
        pairs = torch.empty_like(y).index_copy_(0, order, y).view(*chosen.shape, -1)
        return reduce(torch.add, pairs.unbind(1))


class JoinedNetworks(nn.Module):
    """Experts that one product multiplies, which reads nothing on the host."""

    def __init__(
        self,
        facts: DecoderFacts,
        operations: DecoderOperations,
        weights: Weights,
        places: Sequence[str],  # the places of the experts
    ) -> None:
        super().__init__()
        assert facts.experts is not None
        self.operations, self.activation = operations, facts.activation
        size, inner = facts.hidden_size, facts.experts.size
        gate, up, down = facts.experts.names
        matrices = (
            weights.stacked(places, size, **{gate: inner, up: inner}),
            weights.stacked(places, inner, **{down: size}),
        )
        self.gate_up, self.down = map(constant, matrices)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Return the weighted sums of (n, k) experts of the rows."""
        assert self.operations.grouped_linear is not None
        multiply = self.operations.grouped_linear(len(x))

        def network(pairs: Tensor, ends: Tensor) -> Tensor:
            inner = self.operations.gated(multiply(pairs, self.gate_up, ends), self.activation)
            return multiply(inner, self.down, ends)

        return routed(x, chosen, shares, len(self.down), network)
