"""The benchmarks that need PyTorch run, on tiny models and the CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
from endless_pair import endless_pair
from gguf import GGMLQuantizationType
from gguf_files import write_gguf

from treeflash.language_model import load
from treeflash.testing import require

require("torch")

SHORT = ["--limit", "1", "--max-tokens", "4"]
PAIR_SCRIPTS = {
    "peers.__main__": ["--systems", "transformers,treeflash", "--backends", "cuda"],
    "throughput": ["--backend", "cuda", "--concurrency", "1,2"],
}


@pytest.fixture
def pair(tmp_path):
    """Options that choose a tiny pair on the CPU, and a prompt set."""
    prompts = tmp_path / "a.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": n, "turns": [f"Why {n}"]}) for n in range(2)))
    return [str(prompts), *endless_pair(tmp_path), "--device", "cpu", "--dtype", "float32"]


def test_the_quality_of_few_bits_is_measured(module, tmp_path):
    """Answers are the reference's most likely tokens, so that rows of other tokens show."""
    require("llvmlite")
    write_gguf(tmp_path / "tiny.gguf", kind=lambda name: GGMLQuantizationType.Q4_1)
    prompts, file = tmp_path / "a.jsonl", tmp_path / "out.json"
    prompts.write_text(json.dumps({"id": 0, "turns": ["the 12 the"]}))
    quality = module("decoding.quality")
    options = ["--target", str(tmp_path / "tiny.gguf"), "--max-tokens", "6", "--json", str(file)]
    assert quality.main([str(prompts), *options]) == 0
    reference, *variants = json.loads(file.read_text())["rows"]
    assert float(reference["divergence"]) == 0
    assert reference["same top"] == 1
    assert 1 < float(reference["perplexity"]) < 265  # tokens, of which a uniform guess is one
    assert len({row["divergence"] for row in variants}) == len(quality.VARIANTS)
    assert all(0 < float(row["divergence"]) < 0.2 for row in variants)
    assert {row["tokens"] for row in variants} == {reference["tokens"]} != {0}
    model = load(str(tmp_path / "tiny.gguf"), False, backend="cuda", device="cpu", bits=16)
    answer = model.generate([5, 6, 7], method="ar", max_tokens=6).token_ids
    found = quality.log_probabilities(model, [5, 6, 7, *answer], len(answer))
    assert found.argmax(-1).tolist() == answer
    np.testing.assert_allclose(np.exp(found).sum(-1), 1)


# Seconds, for scripts of benchmarks that change seldom.
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["throughput", "peers.__main__"])
def test_a_comparison_runs(name, module, pair, tmp_path):
    """All systems run, and in float32 they give the same tokens."""
    file = tmp_path / "out.json"
    if name == "peers.__main__":
        pair = [*pair, "--environments", str(tmp_path / "environments"), "--threads", "1"]
    assert module(name).main([*pair, *SHORT, *PAIR_SCRIPTS[name], "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    rows = [row for row in results["rows"] if row["set"] == "a"]
    assert {row["system"] for row in rows} == {"treeflash", "transformers"}
    assert all(row["equal"] == row["prompts"] > 0 for row in rows)
    assert {row["method"] for row in results["skipped"]} <= {"assisted"}
    assert results["device"] == "cpu"
