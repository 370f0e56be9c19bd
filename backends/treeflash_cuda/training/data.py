"""Training data: responses, the target's features of them, and the batches of a run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from treeflash.errors import ConfigError
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response
from treeflash_cuda.attention import TokenBlock
from treeflash_cuda.hf.attention_contexts import MaskedContext
from treeflash_cuda.hf.model_target import ModelTarget
from treeflash_cuda.numerics import top_log_probs
from treeflash_cuda.training.batch import Batch, Drafts
from treeflash_cuda.training.model import ROW_ANCHORS
from treeflash_cuda.training.run import replacing

MIN_RESPONSE_TOKENS = 2
"""An anchor and a token to predict."""
SHARD_SEQUENCES = 64
FORWARD_TOKENS = 2048
"""Maximum number of tokens in one forward pass of the target, padding included."""
OUTPUT_ROWS = 1024
"""Maximum number of rows of logits in memory."""
BATCHES_PER_SORT = 16
"""Sequences are sorted by length within this many batches: enough to keep padding small."""


def divide(
    responses: Sequence[Response],
    held_out: Sequence[Response],
    length: int,
    vocab_size: int,
    config: TrainConfig,
) -> tuple[list[Response], list[Response], Counter[str]]:
    """Return validation data, training data, and the numbers of dropped responses.

    It raises what `truncated_responses` and `split` do.
    """
    validation: list[Response] = []
    dropped = Counter[str]()
    if held_out:
        validation, counts = truncated_responses(held_out, length, vocab_size)
        dropped.update(counts)
    training, counts = truncated_responses(responses, length, vocab_size)
    dropped.update(counts)
    return *split(training, validation, config), dropped


def truncated_responses(
    responses: Sequence[Response], length: int, vocab_size: int
) -> tuple[list[Response], dict[str, int]]:
    """Truncate responses, select the ones with a token to predict, and count the dropped ones.

    A response is `too_short` before truncation, or `too_long` because its prompt leaves no room.
    Raises a ConfigError if no response is left, or they have tokens outside the target's
    vocabulary.
    """
    long_enough = [x for x in responses if len(x.response_ids) >= MIN_RESPONSE_TOKENS]
    truncated = [response.truncate(length) for response in long_enough]
    kept = [x for x in truncated if len(x.response_ids) >= MIN_RESPONSE_TOKENS]
    if not kept:
        raise ConfigError(
            "every response is shorter than two tokens after truncation; raise --max-length"
        )
    if max(max(response.token_ids) for response in kept) >= vocab_size:
        raise ConfigError(
            "the responses have token ids outside the target's vocabulary; "
            "were they made with another target?"
        )
    dropped = {
        "too_short": len(responses) - len(long_enough),
        "too_long": len(long_enough) - len(kept),
    }
    return kept, dropped


def split(
    responses: Sequence[Response], validation: Sequence[Response], config: TrainConfig
) -> tuple[list[Response], list[Response]]:
    """Split into validation and training data; responses to one prompt stay together.

    If there is no validation data, some of `responses` are held out. Raises a ConfigError if
    nothing is left to train on.
    """
    groups: dict[tuple[int, ...], list[Response]] = {}
    for response in responses:
        groups.setdefault(response.prompt_ids, []).append(response)
    held_out = list(validation)
    for response in validation:
        groups.pop(response.prompt_ids, None)
    count = 0 if validation else config.validation_sequences
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(config.seed))
    training: list[Response] = []
    prompts = list(groups)
    for n in order.tolist():
        part = held_out if len(held_out) < count else training
        part.extend(groups[prompts[n]])
    if not training:
        raise ConfigError(
            f"{len(responses)} responses leave nothing to train on after {len(held_out)} are held "
            "out for validation; add responses to other prompts, or lower --validation-sequences"
        )
    return held_out, training


@dataclass(frozen=True, eq=False)
class SequenceFeatures:
    """The features of one sequence; on the CPU if they were cached, else on the target's device."""

    features: Tensor  # (length, layers * hidden_size)
    top_tokens: Tensor  # (response, K) int32; row i predicts token i of the response
    top_log_probs: Tensor  # (response, K) float16 nats


FEATURE_NAMES = ("features", "top_tokens", "top_log_probs")


@dataclass(frozen=True, eq=False)
class FeatureStore:
    """The features of responses by number, computed by the target when they are first needed.

    They are cached in shards of consecutive responses. The features of responses beyond the size
    limit are computed anew each time.
    """

    target: ModelTarget  # captures the outputs of the layers in `layer_ids`
    layer_ids: Sequence[int]  # target layers whose outputs are the features
    responses: Sequence[Response]  # prompts and responses
    top_tokens: int  # K
    folder: Path | None  # the folder of the cache; None caches nothing
    max_bytes: float  # size limit of the cache

    def get(self, numbers: Sequence[int]) -> list[SequenceFeatures]:
        """Return the features of some responses; all that are not cached are computed together."""
        cached = {n: features for n in numbers if (features := self._read(n)) is not None}
        missing = [n for n in numbers if n not in cached]
        cached |= zip(missing, self._compute(missing), strict=True)
        return [cached[n] for n in numbers]

    def fill(self, shard: int) -> None:
        """Compute and cache a shard, unless it is cached or the cache is full.

        A damaged file, of a copied folder or a machine that lost power, is replaced.
        """
        if self.folder is None or self._is_cached(shard):
            return
        if sum(path.stat().st_size for path in self.folder.glob("*.safetensors")) > self.max_bytes:
            return
        first = shard * SHARD_SEQUENCES
        numbers = range(len(self.responses))[first : first + SHARD_SEQUENCES]
        tensors = {
            f"{n}.{name}": getattr(features, name).cpu().contiguous()
            for n, features in zip(numbers, self._compute(numbers), strict=True)
            for name in FEATURE_NAMES
        }
        with replacing(self._path(shard)) as scratch:
            save_file(tensors, scratch)

    @property
    def shards(self) -> int:
        return -(-len(self.responses) // SHARD_SEQUENCES)

    def _path(self, shard: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{shard:05d}.safetensors"

    def _is_cached(self, shard: int) -> bool:
        """Return whether a shard's file is there and whole; a damaged one is removed."""
        path = self._path(shard)
        try:
            with safe_open(path, "pt"):  # it compares the header with the file's size
                return True
        except (FileNotFoundError, SafetensorError):
            path.unlink(missing_ok=True)
        return False

    def _read(self, number: int) -> SequenceFeatures | None:
        if self.folder is None or not self._path(number // SHARD_SEQUENCES).exists():
            return None
        with safe_open(self._path(number // SHARD_SEQUENCES), "pt") as file:
            tensors = [file.get_tensor(f"{number}.{name}") for name in FEATURE_NAMES]
        return SequenceFeatures(*tensors)

    def _compute(self, numbers: Sequence[int]) -> list[SequenceFeatures]:
        """Run the target on sequences of similar length together."""
        computed: dict[int, SequenceFeatures] = {}
        left = sorted(numbers, key=lambda n: len(self.responses[n]))
        while left:
            width = len(self.responses[left[-1]])
            size = max(1, FORWARD_TOKENS // width)
            part, left = left[-size:], left[:-size]
            computed |= zip(part, self._forward([self.responses[n] for n in part]), strict=True)
        return [computed[n] for n in numbers]

    @torch.inference_mode()
    def _forward(self, responses: Sequence[Response]) -> list[SequenceFeatures]:
        device = self.target.device
        width = max(map(len, responses))
        tokens = torch.zeros(len(responses), width, dtype=torch.long)
        for row, response in zip(tokens, responses, strict=True):
            row[: len(response)] = torch.tensor(response.token_ids)
        context = MaskedContext.whole_sequence(width, device)
        decoded, outputs = self.target.run_decoder(tokens.to(device), context)
        features = torch.cat([outputs[i] for i in self.layer_ids], -1)
        results = []
        for row, response in enumerate(responses):
            first, end = len(response.prompt_ids) - 1, len(response) - 1
            hidden = decoded[row, first:end]
            top_tokens, log_probs = target_top(self.target, hidden, self.top_tokens)
            # A copy: a view would keep the padding of all sequences.
            copied = features[row, : len(response)].clone()
            results.append(SequenceFeatures(copied, top_tokens, log_probs.half()))
        return results


def target_top(target: ModelTarget, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the target's (n, k) int32 top tokens and their log probabilities."""
    chunks = hidden.split(OUTPUT_ROWS)
    parts = [top_log_probs(target.logits(chunk), k, temperature=1) for chunk in chunks]
    tokens, log_probs = map(torch.cat, zip(*parts, strict=True))
    return tokens, log_probs


def fingerprint(responses: Sequence[Response], **settings: object) -> str:
    """Name the responses and settings that features were computed from."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for response in responses:
        digest.update(json.dumps([response.prompt_ids, response.response_ids]).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class BatchPlan:
    """The responses of every forward pass of a run."""

    lengths: Sequence[int]  # lengths of the sequences in tokens
    batch: int  # sequences per forward pass, over all processes
    seed: int  # the seed of the shuffles

    def __getitem__(self, forward: int) -> NDArray[np.int64]:
        """Return (batch,) numbers of responses; forward passes count through all epochs."""
        # Each epoch drops its incomplete last batch, which has other responses in every epoch.
        per_epoch = max(1, len(self.lengths) // self.batch)
        epoch, index = divmod(forward, per_epoch)
        return self._epoch(epoch)[index]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the (forward passes, batch): shuffled responses, similar lengths together."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        if len(order) < self.batch:
            return np.resize(order, (1, self.batch))
        order = order[: len(order) // self.batch * self.batch]
        window = BATCHES_PER_SORT * self.batch
        lengths = np.asarray(self.lengths)
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        return random.permutation(order.reshape(-1, self.batch))


class Batches:
    """The batches of one process, by the number of the forward pass."""

    def __init__(
        self, store: FeatureStore, config: TrainConfig, depths: int, process: int, processes: int
    ) -> None:
        """Plan the run of process number `process`; a block predicts `depths` tokens."""
        self.store = store
        self.config = config
        self.depths = depths
        self.process = process
        self.processes = processes
        lengths = [len(response) for response in store.responses]
        self.plan = BatchPlan(lengths, config.sequences * processes, config.seed)

    def __getitem__(self, forward: int) -> Batch:
        """Return the batch of a forward pass, counted from 0 through all epochs."""
        numbers, anchors = self._sequences(forward, self.process)
        responses = [self.store.responses[n] for n in numbers]
        features, device = self.store.get(numbers), self.store.target.device
        return make_batch(responses, features, anchors, self.depths, device)

    def shares(self, forwards: Iterable[int]) -> list[float]:
        """Return this process's share of a step's loss in each of the step's forward passes.

        A share is proportional to the weights of the tokens that the pass predicts, or to their
        number if their weights depend on the predictions. Drafted tokens count as those that they
        replace.
        """
        processes = range(self.processes)
        weights = np.array([[self._weight(n, process) for process in processes] for n in forwards])
        shares: list[float] = (weights[:, self.process] / weights.sum()).tolist()
        return shares

    def _sequences(self, forward: int, process: int) -> tuple[list[int], list[NDArray[np.int64]]]:
        """Return the numbers of the responses of a process, and the anchors of each."""
        first = process * self.config.sequences
        numbers = self.plan[forward][first : first + self.config.sequences].tolist()
        random = np.random.default_rng((self.config.seed, forward, process))
        responses = (self.store.responses[n] for n in numbers)
        return numbers, [choose_anchors(x, self.config.anchors, random) for x in responses]

    def _weight(self, forward: int, process: int) -> float:
        """Sum the weights of the tokens that a process predicts in a forward pass."""
        is_exponential = self.config.position_weights == "exponential"
        gamma = self.config.gamma if is_exponential else np.inf
        by_depth = np.exp(-np.arange(self.depths) / gamma).cumsum()
        numbers, anchors = self._sequences(forward, process)
        ends = (len(self.store.responses[n]) - 1 for n in numbers)
        predicted = (end - roots for end, roots in zip(ends, anchors, strict=True))
        return sum(float(by_depth[np.minimum(x, self.depths) - 1].sum()) for x in predicted)


def choose_anchors(
    response: Response, count: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Choose up to `count` ascending positions of the response with a token after each."""
    positions = np.arange(len(response.prompt_ids), len(response) - 1)
    if len(positions) > count:
        positions = np.sort(random.choice(positions, count, replace=False))
    return positions


def make_batch(
    responses: Sequence[Response],  # the rows
    features: Sequence[SequenceFeatures],  # the features of the responses, on any device
    anchors: Sequence[NDArray[np.int64]],  # the anchors of the responses
    depths: int,  # D, tokens that a block predicts
    device: torch.device | None = None,  # the device of the batch; None is the CPU
) -> Batch:
    """Pad the sequences to one length and the anchors to one number; padding predicts nothing."""
    length = max(map(len, responses))
    count = -(-max(map(len, anchors)) // ROW_ANCHORS) * ROW_ANCHORS
    rows, k = len(responses), features[0].top_tokens.shape[1]
    width = features[0].features.shape[1]
    tokens = torch.zeros(rows, length, dtype=torch.long)
    # Large tensors are filled on the device, sequence by sequence.
    context = torch.zeros(rows, length, width, dtype=features[0].features.dtype, device=device)
    top_tokens = torch.zeros(rows, length, k, dtype=torch.long, device=device)
    top_log_probs = torch.zeros(rows, length, k, device=device)
    positions = torch.zeros(rows, count, dtype=torch.long)
    ends = torch.zeros(rows, count, dtype=torch.long)
    for row, (response, part, roots) in enumerate(zip(responses, features, anchors, strict=True)):
        first, end = len(response.prompt_ids) - 1, len(response) - 1
        tokens[row, : len(response)] = torch.tensor(response.token_ids)
        source = part.features
        if context.device.type == "cuda" and source.device.type == "cpu":
            source = source.pin_memory()  # pageable copies are slow
        context[row, : len(response)] = source
        top_tokens[row, first:end] = part.top_tokens
        top_log_probs[row, first:end] = part.top_log_probs
        positions[row, : len(roots)] = torch.from_numpy(roots)
        ends[row, : len(roots)] = end
    depth = torch.arange(1, depths + 1)
    valid = positions[:, :, None] + depth <= ends[:, :, None]
    tokens, positions, valid = (x.to(device) for x in (tokens, positions, valid))
    return Batch(tokens, context, positions, valid, top_tokens, top_log_probs)


def with_drafts(
    batch: Batch, blocks: nn.Module, target: ModelTarget, share: float, generator: torch.Generator
) -> Batch:
    """Let the drafter draft chains after some of the anchors, and the target score them.

    The drafted tokens follow the sequence for a while, then differ from it. The target scores the
    tokens after the first wrong one too: at inference the drafter's head sees such tokens, but
    never in a sequence. The share of the anchors is rounded up to a multiple of `ROW_ANCHORS`; the
    generator is on the CPU, so that a run is the same on every device.
    """
    total = batch.anchors.shape[1]
    count = min(-(-round(share * total) // ROW_ANCHORS) * ROW_ANCHORS, total)
    if not count:
        return batch
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    columns = chosen.to(batch.anchors.device)
    part = replace(batch, anchors=batch.anchors[:, columns], valid=batch.valid[:, columns])
    with torch.no_grad():
        tokens: Tensor = blocks(part)
    scores = [
        score_drafts(target, *row, batch.top_tokens.shape[2])
        for row in zip(batch.tokens, part.anchors, tokens, strict=True)
    ]
    top_tokens, log_probs = (torch.stack(parts) for parts in zip(*scores, strict=True))
    return replace(batch, drafts=Drafts(columns, tokens, top_tokens, log_probs))


@torch.no_grad()
def score_drafts(
    target: ModelTarget, sequence: Tensor, anchors: Tensor, drafts: Tensor, top_tokens: int
) -> tuple[Tensor, Tensor]:
    """Compute the target's distributions at all tokens of many drafts in one (length,) sequence.

    The roots are at the (C,) anchors, and the (C, D) drafts follow them. Returns (C, D, K) top
    tokens and their log probabilities: element d is given the tokens before it.
    """
    device, length, (count, depths) = sequence.device, len(sequence), drafts.shape
    depth = torch.arange(depths, device=device)
    # No token is scored after the last one of a draft.
    draft_positions = (anchors[:, None] + 1 + depth[:-1]).flatten()
    columns = torch.arange(length, device=device)
    block = torch.arange(count, device=device).repeat_interleave(depths - 1)
    total = length + len(draft_positions)
    ancestors = torch.ones(total, total, dtype=torch.bool, device=device)
    ancestors[:length, length:] = False
    ancestors[length:, :length] = columns <= anchors.repeat_interleave(depths - 1)[:, None]
    ancestors[length:, length:] = block[:, None] == block
    context = MaskedContext([TokenBlock(0, torch.cat([columns, draft_positions]), ancestors)])
    tokens = torch.cat([sequence, drafts[:, :-1].flatten()])
    (states,), _ = target.run_decoder(tokens[None], context)
    drafted = states[length:].unflatten(0, (count, depths - 1))
    scored = torch.cat([states[anchors][:, None], drafted], 1)
    top, log_probs = target_top(target, scored.flatten(0, 1), top_tokens)
    return top.long().unflatten(0, (count, depths)), log_probs.unflatten(0, (count, depths))
