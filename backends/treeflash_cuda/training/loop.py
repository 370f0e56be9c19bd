"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from treeflash.config import LoadConfig
from treeflash.errors import NumericalError
from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import Response
from treeflash_cuda.backend import choose_device, load_target
from treeflash_cuda.target import Target
from treeflash_cuda.training.batches import Batches
from treeflash_cuda.training.blocks import Blocks
from treeflash_cuda.training.export import export
from treeflash_cuda.training.features import FeatureStore, fingerprint
from treeflash_cuda.training.initial import initial_drafter
from treeflash_cuda.training.lm_head import LMHead
from treeflash_cuda.training.objective import objective
from treeflash_cuda.training.on_policy import with_drafts
from treeflash_cuda.training.optimizer import learning_rate, make_optimizer
from treeflash_cuda.training.run import Run
from treeflash_cuda.training.settings import drafter_settings
from treeflash_cuda.training.texts import split, usable
from treeflash_cuda.training.validation import Validation

MEASURED_TEXTS = 8
"""Texts that measure the scale of the target's queries and keys, for `init` target."""


def train(
    target: Path,
    responses: Sequence[Response],
    output: Path,
    config: TrainConfig,
    load: LoadConfig,
    held_out: Sequence[Response],
) -> Iterator[dict[str, Any]]:
    """See `Trainer.train`."""
    accelerator = make_accelerator(config, load)
    model = load_target(
        target, replace(load, device=load.device or str(accelerator.device)), pack=False
    )
    model.find_scale()
    model.model.requires_grad_(False)
    settings = drafter_settings(config, model)
    given = usable(held_out, config, model) if held_out else []
    held_out, texts = split(usable(responses, config, model), given, config)
    measured = [text.token_ids for text in texts[:MEASURED_TEXTS]]
    drafter, head = initial_drafter(config, settings, model, measured)
    depths, layer_ids = drafter.config.depths, drafter.config.target_layer_ids
    run = Run(
        output,
        config,
        accelerator,
        target=target.name,
        dtype=str(model.dtype).removeprefix("torch."),
        data=fingerprint(
            [*held_out, *texts],
            target=target.name,
            dtype=str(model.dtype),
            layers=layer_ids,
            top_tokens=config.top_tokens,
        ),
    )
    if config.freeze_backbone:
        drafter.requires_grad_(False)
    blocks: nn.Module = Blocks(drafter, head, model.embeddings, LMHead(model.lm_head))
    blocks, optimizer = accelerator.prepare(blocks, make_optimizer(blocks, config))
    model.capture(layer_ids)
    with closing(run):
        first = run.resume()
        store = FeatureStore(
            model, layer_ids, texts, config.top_tokens, run.features(), config.cache_gb * 1e9
        )
        if run.features():
            yield from fill_cache(store, accelerator)
        batches = Batches(
            store, config, depths, accelerator.process_index, accelerator.num_processes
        )
        validation = Validation(model, layer_ids, held_out, depths, config)
        for step in range(first, config.steps):
            record = take_step(step, blocks, optimizer, batches, model, config, accelerator)
            last = step + 1 == config.steps
            if held_out and (last or (step + 1) % config.validate_every == 0):
                record["validation"] = validation.measure(blocks)
            run.log(record)
            if last or (step + 1) % config.save_every == 0:
                # In this order, so that a run with its last state also has its checkpoint.
                export(accelerator, blocks, settings, run)
                run.save(step + 1)
            yield record
        if not run.has_checkpoint():  # deleted after the run had finished
            export(accelerator, blocks, settings, run)


def fill_cache(store: FeatureStore, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """Compute the features of all texts, shared out over the processes; yields the progress."""
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
    blocks: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    target: Target,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Take one optimiser step; returns its record.

    Raises:
        NumericalError: the loss is not finite.
    """
    started = time.perf_counter()
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    record: dict[str, Any] = {"step": step + 1, "learning_rate": rate}
    for forward in range(step * config.accumulation, (step + 1) * config.accumulation):
        random = torch.Generator().manual_seed(config.seed + forward)
        with accelerator.accumulate(blocks):
            batch = with_drafts(batches[forward], blocks, target, config.on_policy, random)
            loss, parts = objective(blocks, batch, target.vocab_size, config, random)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(blocks.parameters(), config.clip)
                record["gradient_norm"] = float(norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in parts.items():
            record[name] = record.get(name, 0.0) + value / config.accumulation
    if not math.isfinite(record["loss"]):
        raise NumericalError(
            f"the loss of step {step + 1} is not finite; try a lower learning rate"
        )
    record["seconds"] = time.perf_counter() - started
    return record


def make_accelerator(config: TrainConfig, load: LoadConfig) -> Accelerator:
    """The processes and precision of a run; one process unless `accelerate launch` started it."""
    on_cpu = load.device == "cpu"
    device = choose_device(load.device)
    if load.device not in (None, "cuda", "cpu"):
        torch.cuda.set_device(device)  # accelerate prepares modules on the current device
    return Accelerator(
        cpu=on_cpu,
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}.get(load.dtype or "", "no"),
        gradient_accumulation_steps=config.accumulation,
    )
