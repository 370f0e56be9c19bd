"""Responses of `treeflash distill` against plain decoding, on any backend."""

from __future__ import annotations

import json
from pathlib import Path

from byte_tokens import save_tokenizer

from treeflash.commands import distill
from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.language_model import load
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_target


def check_plain_decoding(backend: str, family: str, folder: Path, *options: str) -> None:
    """Distil responses of several lengths and sampling settings, and decode each again alone."""
    target = folder / "target"
    write_target(target, family, seed=3, vocab_size=259)
    save_tokenizer(target)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(60, 90)]}))
    prompts, output = folder / "prompts.jsonl", folder / "responses.jsonl"
    rows = [{"id": n, "turns": ["a" * (1 + 3 * n), "b"][: 1 + n % 2]} for n in range(6)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--prompts", str(prompts), "--output", str(output), "--target", str(target)]
    arguments += ["--temperature", "0", "0.9", "--top-p", "0.9", "--max-tokens", "12"]
    arguments += ["--seed", "5", "--backend", backend, "--device", "cpu", "--dtype", "float32"]
    assert distill.main([*arguments, *options]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert {(record["id"], record["turn"]) for record in records} == {
        (n, turn) for n in range(6) for turn in range(1 + n % 2)
    }
    model = load(target, False, backend=backend, device="cpu", dtype="float32")
    for record in records:
        assert (record["target"], record["backend"], record["dtype"]) == (
            target.name,
            backend,
            "float32",
        )
        settings = {name: record[name] for name in ("temperature", "top_p", "seed")}
        config = DecodeConfig(
            method="ar",
            max_tokens=12,
            stop_token_ids=model.tokenizer.stop_token_ids,
            sampling=SamplingConfig(**settings),
        )
        assert record["response_ids"] == generate(model.backend, record["prompt_ids"], config)
    assert {record["seed"] for record in records} == {5 + n for n in range(6)}
    assert len({len(record["response_ids"]) for record in records}) > 1, "slots free up together"
