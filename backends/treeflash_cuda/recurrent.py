"""Conditional heads that depend on all tokens of a path: DSpark's `rnn`, and Domino."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash_cuda.drafter import Block, drafted
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.head_weights import DominoWeights
from treeflash_cuda.linear import take
from treeflash_cuda.output_stage import OutputStage
from treeflash_cuda.scores import Markov
from treeflash_cuda.target import Target
from treeflash_cuda.topk import divide_by_temperature, largest, top_log_probs


class Cell(Protocol):
    """A recurrent head: a state for each path, and a bias on the logits of its children."""

    keys: Tensor
    """(Vd, r) of the drafter's tokens: their products with a query are the bias."""

    def step(
        self, state: Tensor, normed: Tensor, previous: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Advance n paths by their last token.

        Args:
            state: (n, state_size) of the paths without it; 0 before the root.
            normed: (1, hidden_size) the normalised output at this depth.
            previous: (n,) tokens of the target's vocabulary.
            depth: of the children, from 1.

        Returns:
            (n, state_size) states, and (n, r) queries.
        """

    def confidence(self, normed: Tensor, previous: Tensor, rows: Tensor) -> Tensor | None:
        """See `Scores.confidence`."""


class MarkovRNN:
    """DSpark: z(b) + <W2[b], tanh(o)>, a gated recurrent unit over W1[a] and the hidden state."""

    def __init__(self, weights: Any, model: DrafterModel) -> None:
        """Take the weights."""
        self.weights = weights
        self.keys = weights.markov_w2.weight
        self.confidence = Markov(weights, model.config).confidence

    def step(
        self, state: Tensor, normed: Tensor, previous: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """See `Cell.step`."""
        rows = self.weights.markov_w1(previous)
        x = torch.cat([state, rows, normed.expand(len(rows), -1)], -1)
        gate, candidate, out = self.weights.joint_proj(x).chunk(3, -1)
        gate = gate.sigmoid()
        return gate * state + (1 - gate) * candidate.tanh(), out.tanh()


class Domino:
    """Domino: z(b) + <W2[b], silu(W1 [u; s])>, where s is a GRU over the tokens' embeddings."""

    def __init__(self, weights: Any, model: DrafterModel, output: OutputStage) -> None:
        """Take the weights."""
        self.weights = weights
        self.output = output
        self.keys = weights.embed_proj["2"].weight
        self.first = model.config.head_from_depth

    def step(
        self, state: Tensor, normed: Tensor, previous: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """See `Cell.step`; before its first depth the bias is 0."""
        gru = self.weights.prefix_gru
        of_input = F.linear(self.output.embed(previous), gru.weight_ih_l0).chunk(3, -1)
        of_state = F.linear(state, gru.weight_hh_l0).chunk(3, -1)
        reset, update = ((of_input[i] + of_state[i]).sigmoid() for i in (0, 1))
        new = (of_input[2] + reset * of_state[2]).tanh()
        state = (1 - update) * new + update * state
        if depth < self.first:
            return state, state.new_zeros(len(state), self.keys.shape[1])
        x = torch.cat([normed.expand(len(state), -1), state], -1)
        return state, F.silu(self.weights.embed_proj["0"](x))

    def confidence(self, normed: Tensor, previous: Tensor, rows: Tensor) -> Tensor | None:
        """See `Scores.confidence`."""
        return None


class RecurrentHead:
    """`treeflash.decoding.interfaces.ARHead` in PyTorch, depth by depth over the paths it keeps."""

    def __init__(self, module: nn.Module, model: DrafterModel, target: Target) -> None:
        """Use the weights of a head with those of its drafter and target."""
        self.module = module
        self.model = model
        self.output = OutputStage(model.config, model.own, target)
        self.cell: Cell = (
            Domino(module, model, self.output)
            if isinstance(module, DominoWeights)
            else MarkovRNN(module, model)
        )

    @torch.inference_mode()
    def transitions(
        self,
        blocks: Sequence[Block],
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None = None,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> list[TransitionTable]:
        """See `ARHead.transitions`; text by text."""
        normed = self.model.norm(drafted(blocks))
        depths = len(normed) // len(blocks)
        logits = self.output.logits(normed)
        if (added := self.output.noise(self.output.upload(noise))) is not None:
            logits = logits + added
        parts = zip(blocks, normed.split(depths), logits.split(depths), strict=True)
        width = m if rows is None else min(m, rows)
        return [
            self._table(block.root, *x, width, k, temperature, shortlist) for block, *x in parts
        ]

    @torch.inference_mode()
    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `ARHead.log_probs`."""
        normed = self.model.norm(block.hidden)
        logits, state = self.output.logits(normed), self._start(normed)
        tokens = torch.from_numpy(previous).to(normed.device)
        rows = []
        for d in range(len(normed)):
            one = slice(d, d + 1)
            state, queries = self.cell.step(state, normed[one], tokens[one], d + 1)
            rows.append(logits[one].float() + (queries @ self.cell.keys.T).float())
        log_probs = torch.cat(rows).log_softmax(-1)
        return self.output.over_target_vocabulary(log_probs).cpu().numpy()

    def _table(
        self,
        root: int,
        normed: Tensor,
        logits: Tensor,
        width: int,
        k: int,
        temperature: float,
        shortlist: int | None,
    ) -> TransitionTable:
        """The table of a text, of which at most `width` paths are expanded at each depth."""
        keys, vocab, mass = self.cell.keys, None, None
        if shortlist is not None and shortlist < logits.shape[1]:
            marginal = divide_by_temperature(logits, temperature).log_softmax(-1)
            vocab = largest(marginal.amax(0), shortlist)
            mass = marginal.index_select(1, vocab).logsumexp(-1)
            keys, logits = take(keys, vocab), logits.index_select(1, vocab)
        k = min(k, logits.shape[1])
        state = self._start(normed)
        previous = torch.full((1,), root, device=normed.device)
        paths = logits.new_zeros(1, dtype=torch.float32)
        parts, sizes = [], []
        for d in range(len(normed)):
            one = normed[d : d + 1]
            state, queries = self.cell.step(state, one, previous, d + 1)
            scores = logits[d].float() + (queries @ keys.T).float()
            tokens, log_probs = top_log_probs(scores, k, temperature)
            if vocab is not None and mass is not None:
                tokens, log_probs = vocab[tokens.long()].int(), log_probs + mass[d]
            tokens = self.output.to_target(tokens)
            of_children = (paths[:, None] + log_probs).flatten()
            ranks = of_children.clone()
            ranks[0] = torch.inf  # the first row is the chain's, which must not end here
            kept = ranks.topk(min(width, len(ranks))).indices
            found = [tokens.flatten(), log_probs.flatten().view(torch.int32), kept.int()]
            confidence = self.cell.confidence(one, previous, torch.zeros_like(previous))
            if confidence is not None:
                found.append(confidence.view(torch.int32))
            parts += found
            sizes.append([len(part) for part in found])
            previous, paths = tokens.flatten()[kept].long(), of_children[kept]
            state = take(state, kept // k)
        # One read from the device for all depths.
        numbers = torch.cat(parts).cpu().numpy()
        ends = np.cumsum(np.concatenate(sizes))[:-1]
        each = np.split(numbers, ends)
        found_, log_probs_, kept_, *confidences = (
            each[i :: len(sizes[0])] for i in range(len(sizes[0]))
        )
        return TransitionTable.from_paths(
            [x.reshape(-1, k) for x in found_],
            [x.view(np.float32).reshape(-1, k) for x in log_probs_],
            kept_,
            *([x.view(np.float32) for x in part] for part in confidences),
        )

    def _start(self, normed: Tensor) -> Tensor:
        """The (1, state_size) state before the root."""
        return normed.new_zeros(1, self.model.config.head_state_size)
