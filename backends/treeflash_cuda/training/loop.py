"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from treeflash.config import LoadConfig
from treeflash.errors import ConfigError, NumericalError
from treeflash.responses import Response
from treeflash.train_config import TrainConfig
from treeflash_cuda.backend import choose_device, load_target
from treeflash_cuda.target import Target
from treeflash_cuda.training.batches import Batches, choose_anchors, make_batch
from treeflash_cuda.training.blocks import Batch, Blocks
from treeflash_cuda.training.export import export
from treeflash_cuda.training.features import FeatureStore, fingerprint
from treeflash_cuda.training.initial import drafter_settings, initial_drafter
from treeflash_cuda.training.losses import Output, TargetRows, make_shortlist
from treeflash_cuda.training.run import Run
from treeflash_cuda.training.validation import Validation

MEASURED_TEXTS = 8
"""Texts by which the target's queries and keys are measured for a drafter made from it."""


def train(
    target: Path, responses: Sequence[Response], output: Path, config: TrainConfig, load: LoadConfig
) -> Iterator[dict[str, Any]]:
    """See `Trainer.train`."""
    accelerator = make_accelerator(config, load)
    load = replace(load, device=load.device or str(accelerator.device))
    model = load_target(target, load)
    model.model.requires_grad_(False)
    settings = drafter_settings(config, model)
    held_out, texts = split(usable(responses, config, model), config)
    layer_ids = settings["dflash_config"]["target_layer_ids"]
    data = fingerprint(
        [*held_out, *texts],
        target=str(target.name),
        dtype=str(model.dtype),
        layers=layer_ids,
        top_tokens=config.top_tokens,
    )
    run = Run(output, config, data, accelerator)
    drafter, head = initial_drafter(
        config, settings, model, [text.token_ids for text in texts[:MEASURED_TEXTS]]
    )
    model.capture(layer_ids)
    blocks = Blocks(drafter, head, model.embeddings)
    if config.freeze_backbone:
        drafter.requires_grad_(False)
    optimizer = make_optimizer(blocks, config)
    blocks, optimizer = accelerator.prepare(blocks, optimizer)
    store = FeatureStore(
        model, layer_ids, texts, config.top_tokens, run.features(), config.cache_gb * 1e9
    )
    first = run.resume(accelerator)
    if run.features() is not None:
        for shard in range(store.shards):
            if accelerator.is_main_process:
                store.fill(shard)
            yield {"shard": shard + 1, "shards": store.shards}
        accelerator.wait_for_everyone()
    batches = Batches(
        store, config, drafter.config.block_size, accelerator.process_index, accelerator.num_processes
    )
    validation = Validation(model, layer_ids, held_out, drafter.config.block_size, config)
    head_of_target = Output(model.output)
    for step in range(first, config.steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        sums: dict[str, float] = {}
        for part in range(config.accumulation):
            forward = step * config.accumulation + part
            batch = batches[forward]
            generator = torch.Generator().manual_seed(
                hash((config.seed, forward, accelerator.process_index)) % 2**63
            )
            with accelerator.accumulate(blocks):
                loss, parts = losses(blocks, batch, head_of_target, config, generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(blocks.parameters(), config.clip)
                    parts["gradient_norm"] = float(norm) * config.accumulation
                optimizer.step()
                optimizer.zero_grad()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value / config.accumulation
        if not math.isfinite(sums["loss"]):
            raise NumericalError(
                f"the loss of step {step + 1} is not finite; try a lower learning rate"
            )
        done = step + 1
        sums["learning_rate"] = learning_rate(step, config)
        sums["seconds"] = time.perf_counter() - started
        record = run.log({"step": done, **sums})
        last = done == config.steps
        if held_out and (last or done % config.validate_every == 0):
            record |= run.log({"step": done, "validation": validation.measure(blocks, accelerator)})
        if last or done % config.save_every == 0:
            run.save(accelerator, done)
            export(accelerator, blocks, settings, run)
        yield record
    run.close()


def make_accelerator(config: TrainConfig, load: LoadConfig) -> Accelerator:
    """The processes and precision of a run, as `accelerate launch` set them or alone."""
    on_cpu = load.device == "cpu" or not torch.cuda.is_available()
    if not on_cpu:
        choose_device(load.device)
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(load.dtype or "", "no")
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=config.accumulation,
    )


def usable(
    responses: Sequence[Response], config: TrainConfig, target: Target
) -> list[Response]:
    """The texts that have something to predict after cutting.

    Raises:
        ConfigError: there are none, or they have tokens that the target does not know.
    """
    limit = min(config.max_length, int(target.config.max_position_embeddings))
    texts = [response.cut(limit) for response in responses]
    texts = [text for text in texts if len(text.response_ids) > 1]
    if not texts:
        raise ConfigError("no response has two tokens or more within max-length; raise it")
    if max(max(text.token_ids) for text in texts) >= target.vocab_size:
        raise ConfigError(
            "the responses have token ids outside the target's vocabulary; "
            "were they made with another target?"
        )
    return texts


def split(
    texts: Sequence[Response], config: TrainConfig
) -> tuple[list[Response], list[Response]]:
    """Texts to validate on and texts to train on; one prompt's answers stay together."""
    groups: dict[tuple[int, ...], list[Response]] = {}
    for text in texts:
        groups.setdefault(text.prompt_ids, []).append(text)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(config.seed))
    held_out: list[Response] = []
    rest: list[Response] = []
    prompts = list(groups)
    for n in order.tolist():
        chosen = held_out if len(held_out) < config.validation_sequences else rest
        chosen.extend(groups[prompts[n]])
    if not rest:
        raise ConfigError(
            f"{len(texts)} responses leave nothing to train on beside "
            f"{config.validation_sequences} to validate; give more, or lower validation-sequences"
        )
    return held_out, rest


def losses(
    blocks: nn.Module,
    batch: Batch,
    output: Output,
    config: TrainConfig,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and what it consists of."""
    row, position = batch.depths(batch.valid.shape[2] + 1).T
    if config.loss == "ce":
        tokens = batch.tokens[row, position][:, None]
        rows = TargetRows(tokens, torch.zeros_like(tokens, dtype=torch.float32))
    else:
        rows = TargetRows(
            batch.top_tokens[row, position - 1], batch.top_log_probs[row, position - 1]
        )
    shortlist = None
    if config.negatives:
        vocab_size = len(output.weight)
        shortlist = make_shortlist(rows.tokens, vocab_size, config.negatives, generator)
    depth = torch.arange(batch.valid.shape[2], device=position.device)
    weights = torch.exp(-depth / config.gamma).expand_as(batch.valid)[batch.valid]
    weights = weights / weights.sum()
    marginal, corrected = blocks(batch, output, shortlist, rows)
    of_marginal = (weights * marginal).sum()
    parts = {"marginal": of_marginal}
    loss = of_marginal
    if corrected is not None:
        parts["corrected"] = (weights * corrected).sum()
        loss = config.marginal_weight * of_marginal + config.corrected_weight * parts["corrected"]
    parts["loss"] = loss
    return loss, {name: float(value.detach()) for name, value in parts.items()}


def make_optimizer(blocks: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay."""
    trained = [p for p in blocks.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0 after the last step."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, config.steps - warm)
    return config.learning_rate * (1 + math.cos(math.pi * share)) / 2
