"""The command line of train."""

import json
from types import SimpleNamespace

import pytest

from treeflash import train


@pytest.fixture
def run(monkeypatch, byte_tokenizer, tmp_path, capsys):
    """Run the command with a trainer that yields records: exit status and standard error."""
    responses = tmp_path / "responses.jsonl"
    responses.write_text(json.dumps({"prompt_ids": [1], "response_ids": [2]}))
    monkeypatch.setattr(train, "resolve_target", lambda name: None)
    monkeypatch.setattr(train.Tokenizer, "from_folder", lambda folder: byte_tokenizer)

    def run(records, *arguments):
        fake = SimpleNamespace(train=lambda *_: records)
        monkeypatch.setattr(train, "trainer", lambda name: fake)
        capsys.readouterr()
        output = str(tmp_path / "out")
        code = train.main(["--responses", str(responses), "--output", output, *arguments])
        return code, capsys.readouterr().err

    return run


def interrupted(records):
    yield from records
    raise KeyboardInterrupt


def test_validations_are_shown(run):
    validation = {"kl_marginal": [1.0], "chain_marginal": 1.25, "chain_corrected": 1.5}
    records = [
        {"shard": 1, "shards": 1},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5, "validation": validation},
    ]
    code, error = run(iter(records), "--steps", "2")
    assert code == 0
    assert "step 2: loss 1.500, chain_marginal 1.250, chain_corrected 1.500" in error
    assert "out: trained; pass it as --drafter" in error


def test_an_interrupted_run_says_whether_it_can_resume(run, tmp_path):
    code, error = run(interrupted([{"step": 1, "loss": 2.0}]))
    assert code == 130
    assert "interrupted before the first checkpoint; rerunning starts over" in error
    (tmp_path / "out" / "state").mkdir(parents=True)
    code, error = run(interrupted([{"step": 1, "loss": 2.0}]))
    assert code == 130
    assert "interrupted; run the same command again to resume from the last state" in error
