"""The training loop: optimiser steps, validation, and the order in which a run saves."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
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
    divide,
    fingerprint,
    make_batch,
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What all steps of a run need."""

    config: TrainConfig
    accelerator: Accelerator
    run: TrainingRun
    target: ModelTarget
    settings: dict[str, Any]  # the drafter's `config.json`
    blocks: nn.Module  # `Blocks`, which accelerate may have wrapped
    optimizer: torch.optim.Optimizer
    batches: Batches
    validation: Validation


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
    validation_data, training_data, dropped = divide(responses, held_out, *limits, config)
    if dropped.total():
        yield dict(dropped)
    device = load.device or str(processes.device)
    prepare(torch.device(device))
    model = load_target(target, replace(load, device=device, images=False), pack=False)
    assert isinstance(model, ModelTarget), "see `load_decoder`"
    accelerator = Accelerator(
        mixed_precision=MIXED_PRECISION.get(model.dtype, "no"),
        gradient_accumulation_steps=config.accumulation,
    )
    settings, blocks = make_blocks(config, model, training_data)
    depths, layer_ids = blocks.model.config.depths, blocks.model.config.target_layer_ids
    data = fingerprint(
        [*validation_data, *training_data],
        target=target.name,
        dtype=str(model.dtype),
        layers=layer_ids,
        top_tokens=config.top_tokens,
    )
    identity = {**known, "dtype": str(model.dtype).removeprefix("torch."), "data": data}
    run = TrainingRun(output, accelerator, identity, request)
    prepared, optimizer = accelerator.prepare(blocks, make_optimizer(blocks, config))
    model.capture(layer_ids)
    with closing(run):
        first = run.resume()
        folder, max_bytes = run.feature_folder(), config.cache_gb * 1e9
        store = FeatureStore(model, layer_ids, training_data, config.top_tokens, folder, max_bytes)
        if folder is not None:
            yield from fill_cache(store, accelerator)
        ranks = accelerator.process_index, accelerator.num_processes
        training = Training(
            config=config,
            accelerator=accelerator,
            run=run,
            target=model,
            settings=settings,
            blocks=prepared,
            optimizer=optimizer,
            batches=Batches(store, config, depths, *ranks),
            validation=Validation(model, layer_ids, validation_data, depths, config),
        )
        yield from take_steps(training, first)
        if not has_checkpoint(output):  # deleted after the run had finished
            restore_checkpoint(training)


def make_blocks(
    config: TrainConfig, model: ModelTarget, training_data: Sequence[Response]
) -> tuple[dict[str, Any], Blocks]:
    """Make the drafter with which a run starts, and its `config.json`.

    Raises a ConfigError if it does not fit the target.
    """
    model.find_scale()
    model.model.requires_grad_(False)
    settings = drafter_settings(config, model)
    measured = [response.token_ids for response in training_data[:MEASURED_SEQUENCES]]
    drafter, head = initial_drafter(config, settings, model, measured)
    if config.freeze_backbone or config.freeze_layers:
        drafter.requires_grad_(False)
        drafter.fc.requires_grad_(config.freeze_layers)
    assert isinstance(model.embeddings, Tensor)  # weights of few bits are not trained with
    return settings, Blocks(drafter, head, model.embeddings, model.lm_head)


def take_steps(training: Training, first: int) -> Iterator[dict[str, Any]]:
    """Take the steps after the first ones; yields their records.

    A signal ends the run after the step that is running, whose state is saved.
    """
    config, accelerator, run = training.config, training.accelerator, training.run
    step, (position, _) = first, progress(first, run.records, config, accelerator)
    with delayed_signals() as signals:
        while position < config.steps:
            record = take_step(step, learning_rate(position, config), training)
            step += 1
            position, is_best = validate(training, step, record)
            run.log(record)
            # The first process decides for all.
            interrupt = int(
                broadcast(torch.tensor(signals[0] if signals else 0, device=accelerator.device))
            )
            is_last = position >= config.steps
            save(
                training,
                step,
                is_due=is_last or bool(interrupt) or step % config.save_every == 0,
                is_best="validation" in record and is_best,
                is_last=is_last,
            )
            yield record
            if interrupt == signal.SIGINT:
                raise KeyboardInterrupt
            if interrupt:
                raise SystemExit(128 + interrupt)


def validate(training: Training, step: int, record: dict[str, Any]) -> tuple[float, bool]:
    """Add a validation to the record of a step if it is due; return the `progress` after it."""
    config, accelerator = training.config, training.accelerator
    records = [*training.run.records, record]
    position, is_best = progress(step, records, config, accelerator)
    is_due = position >= config.steps or step % config.validate_every == 0
    if training.validation.batches and is_due:
        started = time.perf_counter()
        record["validation"] = training.validation.measure(training.blocks)
        record["seconds"] += time.perf_counter() - started
        position, is_best = progress(step, records, config, accelerator)
    return position, is_best


def save(training: Training, step: int, *, is_due: bool, is_best: bool, is_last: bool) -> None:
    """Save the drafter and the state of the run after a step, where they are needed.

    With `patience` the drafter is saved that is the best so far, otherwise with each state.
    """
    keeps_best, run = training.config.patience is not None, training.run
    is_lowest = keeps_best and is_best
    if is_lowest and not run.has_state:
        is_due = True  # a drafter without a state is not overwritten
    # This order gives a run with its last state a checkpoint too.
    if is_lowest or (is_due and not (keeps_best and has_checkpoint(run.folder))):
        export(training.accelerator, training.blocks, training.settings, run)
    if is_due:
        run.save(step, finished=is_last)


def restore_checkpoint(training: Training) -> None:
    """Write the drafter of a run that is over; a ConfigError if it was another than the last."""
    config, run = training.config, training.run
    _, is_best = progress(config.steps, run.records, config, training.accelerator)
    if config.patience is not None and not is_best:
        raise ConfigError(
            f"{run.folder} has lost the drafter with the lowest validation loss, and the state "
            "of its run is a later one; give another --output"
        )
    export(training.accelerator, training.blocks, training.settings, run)


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


def take_step(step: int, rate: float, training: Training) -> dict[str, Any]:
    """Take one optimiser step; returns its record.

    The loss is the weighted mean over the tokens of all forward passes and processes, as if they
    were one batch. Raises a NumericalError if the loss or its gradient is not finite.
    """
    config, accelerator, target = training.config, training.accelerator, training.target
    blocks, optimizer, batches = training.blocks, training.optimizer, training.batches
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
