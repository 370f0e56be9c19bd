"""The training loop: optimiser steps, validation, and the order in which a run saves."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn

from treeflash.config import LoadConfig
from treeflash.errors import ConfigError, NumericalError
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response
from treeflash_cuda.device import choose_device, prepare
from treeflash_cuda.hf.model_target import ModelTarget
from treeflash_cuda.target import max_positions, read_model_config
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training.batch import Batch
from treeflash_cuda.training.data import (
    Batches,
    FeatureStore,
    choose_anchors,
    fingerprint,
    make_batch,
    split,
    truncated_responses,
    with_drafts,
)
from treeflash_cuda.training.initial import drafter_settings, initial_drafter, refuse_options
from treeflash_cuda.training.losses import Outcomes, forward_kl, objective
from treeflash_cuda.training.model import Blocks
from treeflash_cuda.training.run import TrainingRun, export, has_checkpoint, is_finished

MIXED_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What accelerate calls the training of float32 weights beside a target of a half precision."""
VALIDATION_ANCHORS = 16
"""Anchors per validation sequence."""
MEASURED_SEQUENCES = 8
"""Sequences that measure the scale of the target's queries and keys, for `init` target."""


def train(
    target: Path,
    responses: Sequence[Response],
    output: Path,
    config: TrainConfig,
    load: LoadConfig,
    held_out: Sequence[Response],
) -> Iterator[dict[str, Any]]:
    """Train as `treeflash.training.interfaces.Trainer.train` describes, in PyTorch."""
    processes = start_processes(load)
    known = {**asdict(config), "processes": processes.num_processes, "target": target.name}
    request = fingerprint(
        [*held_out, *responses], held_out=len(held_out), dtype=load.dtype, **known
    )
    if is_finished(output, request):
        return
    # What does not fit is said before weights are read.
    shape = read_model_config(target).get_text_config()
    refuse_options(config, shape.num_hidden_layers, shape.vocab_size)
    limits = min(config.max_length, max_positions(shape)), shape.vocab_size
    validation_data: list[Response] = []
    dropped = Counter[str]()
    if held_out:
        validation_data, counts = truncated_responses(held_out, *limits)
        dropped.update(counts)
    training_data, counts = truncated_responses(responses, *limits)
    dropped.update(counts)
    if dropped.total():
        yield dict(dropped)
    validation_data, training_data = split(training_data, validation_data, config)
    device = load.device or str(processes.device)
    prepare(torch.device(device))
    model = load_target(target, replace(load, device=device, images=False), pack=False)
    assert isinstance(model, ModelTarget), "see `load_decoder`"
    accelerator = Accelerator(
        mixed_precision=MIXED_PRECISION.get(model.dtype, "no"),
        gradient_accumulation_steps=config.accumulation,
    )
    model.find_scale()
    model.model.requires_grad_(False)
    settings = drafter_settings(config, model)
    measured = [response.token_ids for response in training_data[:MEASURED_SEQUENCES]]
    drafter, head = initial_drafter(config, settings, model, measured)
    depths, layer_ids = drafter.config.depths, drafter.config.target_layer_ids
    data = fingerprint(
        [*validation_data, *training_data],
        target=target.name,
        dtype=str(model.dtype),
        layers=layer_ids,
        top_tokens=config.top_tokens,
    )
    identity = {**known, "dtype": str(model.dtype).removeprefix("torch."), "data": data}
    run = TrainingRun(output, accelerator, identity, request)
    if config.freeze_backbone or config.freeze_layers:
        drafter.requires_grad_(False)
        drafter.fc.requires_grad_(config.freeze_layers)
    assert isinstance(model.embeddings, Tensor)  # weights of few bits are not trained with
    blocks: nn.Module = Blocks(drafter, head, model.embeddings, model.lm_head)
    blocks, optimizer = accelerator.prepare(blocks, make_optimizer(blocks, config))
    model.capture(layer_ids)
    with closing(run):
        first = run.resume()
        folder, max_bytes = run.feature_folder(), config.cache_gb * 1e9
        store = FeatureStore(model, layer_ids, training_data, config.top_tokens, folder, max_bytes)
        if folder is not None:
            yield from fill_cache(store, accelerator)
        batches = Batches(
            store, config, depths, accelerator.process_index, accelerator.num_processes
        )
        validation = Validation(model, layer_ids, validation_data, depths, config)
        step, (position, is_best) = first, progress(first, run.records, config, accelerator)
        with delayed_signals() as signals:
            while position < config.steps:
                rate = learning_rate(position, config)
                record = take_step(
                    step, rate, blocks, optimizer, batches, model, config, accelerator
                )
                step += 1
                position, is_best = progress(step, [*run.records, record], config, accelerator)
                is_last = position >= config.steps
                if validation_data and (is_last or step % config.validate_every == 0):
                    started = time.perf_counter()
                    record["validation"] = validation.measure(blocks)
                    record["seconds"] += time.perf_counter() - started
                    position, is_best = progress(step, [*run.records, record], config, accelerator)
                    is_last = position >= config.steps
                run.log(record)
                # The first process decides for all.
                interrupt = int(
                    broadcast(torch.tensor(signals[0] if signals else 0, device=accelerator.device))
                )
                is_saved = is_last or interrupt or step % config.save_every == 0
                is_lowest = config.patience is not None and "validation" in record and is_best
                if is_lowest and not run.has_state:
                    is_saved = True  # a drafter without a state is not overwritten
                is_needed = config.patience is None or not has_checkpoint(output)
                # This order gives a run with its last state a checkpoint too.
                if is_lowest or (is_saved and is_needed):
                    export(accelerator, blocks, settings, run)
                if is_saved:
                    run.save(step, finished=is_last)
                yield record
                if interrupt == signal.SIGINT:
                    raise KeyboardInterrupt
                if interrupt:
                    raise SystemExit(128 + interrupt)
        if not has_checkpoint(output):  # deleted after the run had finished
            if config.patience is not None and not is_best:
                raise ConfigError(
                    f"{output} has lost the drafter with the lowest validation loss, and the state "
                    "of its run is a later one; give another --output"
                )
            export(accelerator, blocks, settings, run)


def start_processes(load: LoadConfig) -> PartialState:
    """Set up the processes and the device of a run; one process without `accelerate launch`."""
    device = choose_device(load.device)
    if load.device not in (None, "cuda", "cpu"):
        torch.cuda.set_device(device)  # accelerate prepares modules on the current device
    return PartialState(cpu=load.device == "cpu")


@contextmanager
def delayed_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that the running step can end; a second Ctrl-C raises.

    A signal that the process handles in its own way is not collected: shells turn Ctrl-C off for
    jobs in the background.
    """
    signals: list[int] = []

    def collect(number: int, _: object) -> None:
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(number)
        hint = "; press Ctrl-C again to stop without it" if number == signal.SIGINT else ""
        warnings.warn(f"the state is saved after this step{hint}", stacklevel=2)

    replaced = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler in (signal.default_int_handler, signal.SIG_DFL):
                replaced[number] = handler
                signal.signal(number, collect)
    try:
        yield signals
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def make_optimizer(blocks: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create AdamW, without weight decay for norms and biases."""
    trainable = [p for p in blocks.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )


def progress(
    step: int, records: Sequence[dict[str, Any]], config: TrainConfig, accelerator: Accelerator
) -> tuple[float, bool]:
    """Return the position after `step` steps, and whether the last validation has the lowest loss.

    The position is the steps, or what they would be if every step took the same part of the time of
    the run; `TrainConfig.steps` or more when it is over. Only the first process has the log.
    """
    position = float(step)
    if config.minutes is not None:
        seconds = sum(record["seconds"] for record in records)
        position = max(position, config.steps * seconds / (60 * config.minutes))
    losses = [validation_loss(r["validation"], config) for r in records if "validation" in r]
    since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    if config.patience is not None and since_best >= config.patience:
        position = math.inf
    values = torch.tensor([position, since_best], device=accelerator.device)
    position, since_best = broadcast(values).tolist()
    return position, since_best == 0


def validation_loss(validation: Mapping[str, Any], config: TrainConfig) -> float:
    """Compute the mean KL divergence over depths, with the head if any, weighted as in training."""
    divergences = validation.get("kl_corrected", validation["kl_marginal"])
    weights = np.exp(-np.arange(len(divergences)) / config.gamma)
    return float(np.average(divergences, weights=weights))


def learning_rate(step: float, config: TrainConfig) -> float:
    """Warm up linearly, then decay by a cosine that reaches 0 after the last step."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.learning_rate * min(1.0, (step + 1) / warmup)
    decay = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * decay)) / 2


def fill_cache(store: FeatureStore, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """Compute the features of all responses, divided among the processes; yields the progress."""
    for shard in range(store.shards):
        process = shard % accelerator.num_processes
        if process == accelerator.process_index:
            store.fill(shard)
        if process == accelerator.num_processes - 1:
            accelerator.wait_for_everyone()  # often, so that no process waits for long
        yield {"shard": shard + 1, "shards": store.shards}
    accelerator.wait_for_everyone()


def take_step(
    step: int,
    rate: float,
    blocks: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    target: ModelTarget,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Take one optimiser step; returns its record.

    The loss is the weighted mean over the tokens of all forward passes and processes, as if they
    were one batch. Raises a NumericalError if the loss or its gradient is not finite.
    """
    started = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = rate
    record: dict[str, Any] = {"step": step + 1, "learning_rate": rate}
    forwards = range(step * config.accumulation, (step + 1) * config.accumulation)
    sums: dict[str, float] = defaultdict(float)
    for forward, share in zip(forwards, batches.shares(forwards), strict=True):
        random = torch.Generator().manual_seed(config.seed + forward)
        with accelerator.accumulate(blocks):
            batch = with_drafts(batches[forward], blocks, target, config.on_policy, random)
            loss, parts = objective(blocks, batch, target.vocab_size, config, random)
            for name, value in parts.items():
                sums[name] += share * value
            # accelerate averages the gradients of the forward passes and of the processes.
            accelerator.backward(loss * (share * config.accumulation * accelerator.num_processes))
            if accelerator.sync_gradients:
                losses = torch.tensor(list(sums.values()), dtype=torch.float64)
                losses = accelerator.reduce(losses.to(accelerator.device), "sum")
                record |= zip(sums, losses.tolist(), strict=True)
                norm = float(accelerator.clip_grad_norm_(blocks.parameters(), config.clip))
                record["gradient_norm"] = norm
                _check_finite(record, accelerator)
            optimizer.step()
            optimizer.zero_grad()
    record["seconds"] = time.perf_counter() - started
    return record


def _check_finite(record: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Raise a NumericalError before a step that would make the weights useless."""
    names = {"loss": "loss"}
    if accelerator.scaler is None:  # it skips a step whose gradient overflows in float16
        names["gradient_norm"] = "gradient"
    for key, name in names.items():
        if not math.isfinite(record[key]):
            raise NumericalError(
                f"the {name} of step {record['step']} is not finite; try a lower learning rate"
            )


class Validation:
    """Held-out responses, always with the same anchors."""

    def __init__(
        self,
        target: ModelTarget,
        layer_ids: Sequence[int],
        responses: Sequence[Response],
        depths: int,
        config: TrainConfig,
    ) -> None:
        """Run the target on the responses once; its features are kept on the CPU."""
        self.device = target.device
        self.batches: list[Batch] = []
        random = np.random.default_rng(config.seed)
        responses = sorted(responses, key=len)
        store = FeatureStore(target, layer_ids, responses, config.top_tokens, None, 0)
        for first in range(0, len(responses), config.sequences):
            numbers = range(len(responses))[first : first + config.sequences]
            part = [responses[n] for n in numbers]
            anchors = [choose_anchors(response, VALIDATION_ANCHORS, random) for response in part]
            batch = make_batch(part, store.get(numbers), anchors, depths)
            self.batches.append(batch.pin() if self.device.type == "cuda" else batch)

    @torch.no_grad()
    def measure(self, blocks: nn.Module) -> dict[str, Any]:
        """Measure the metrics of the drafter, for `marginal` and, with a head, for `corrected`.

        By depth, `kl_*` is the mean KL divergence in nats, `acceptance_*` the mean overlap of the
        distributions, and `top1_*` how often the top token is the sequence's. `chain_*` is the
        block efficiency of the chain of top tokens.
        """
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        anchors = 0
        for batch in (batch.to(self.device) for batch in self.batches):
            scored, target = batch.scored()
            marginal, corrected = blocks(batch, scored)
            anchors += int(batch.valid.any(2).sum())
            for name, prediction in (("marginal", marginal), ("corrected", corrected)):
                if prediction is None:
                    continue
                outcomes = Outcomes.compare(target, prediction.log_probs)
                metrics = {
                    f"kl_{name}": forward_kl(outcomes),
                    f"acceptance_{name}": outcomes.acceptance(),
                    f"top1_{name}": (outcomes.log_next >= prediction.best).float(),
                }
                for key, value in metrics.items():
                    table = torch.zeros(batch.valid.shape, device=value.device)
                    table[batch.valid] = value
                    sums[key] = sums[key] + table.sum((0, 1)).cpu()
                    if key.startswith("top1"):
                        chain = f"chain_{name}"
                        sums[chain] = sums[chain] + table.cumprod(2).sum().cpu()
            sums["count"] = sums["count"] + batch.valid.sum((0, 1)).cpu()
        counts = sums.pop("count").clamp(min=1)
        return {
            name: 1 + float(value) / max(anchors, 1)
            if name.startswith("chain")
            else [round(float(v), 4) for v in value / counts]
            for name, value in sums.items()
        }
