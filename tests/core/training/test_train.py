"""The command line of train."""

import json
from types import SimpleNamespace

import pytest

from treeflash.commands import train
from treeflash.errors import ConfigError


@pytest.fixture
def run(monkeypatch, byte_tokenizer, tmp_path, capsys):
    """Run the command with a trainer that yields records: exit status and standard error."""
    responses = tmp_path / "responses.jsonl"
    line = {"prompt_ids": [1], "response_ids": [2], "target": "a/other"}
    responses.write_text(json.dumps(line))
    monkeypatch.setattr(train, "resolve_target", lambda name: tmp_path / "own")
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
        {"too_short": 3, "too_long": 2},
        {"shard": 1, "shards": 1},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5, "validation": validation},
    ]
    code, error = run(iter(records), "--steps", "2")
    assert code == 0
    assert "step 2: loss 1.500, chain_marginal 1.250, chain_corrected 1.500" in error
    assert (
        "dropped 5 responses: 3 shorter than two tokens, 2 after truncation to "
        "--max-length 3072\n" in error
    )
    assert "out: trained; pass it as --drafter" in error
    assert "warning: 1 of 1 responses were written by a/other, not by the target own;" in error


def test_the_bar_of_a_finished_run_is_full(run):
    code, error = run(iter([]), "--steps", "7")
    assert code == 0
    assert "7/7" in error
    assert "out: trained; pass it as --drafter" in error


def test_the_bar_of_a_run_that_a_limit_stopped_shows_its_steps(run):
    code, error = run(iter([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]), "--minutes", "1")
    assert code == 0
    assert "2/10000" in error
    assert "10000/10000" not in error


def test_dropped_responses_are_counted_before_an_error(run):
    def fail():
        yield {"too_short": 1, "too_long": 1}
        raise ConfigError("12 responses leave nothing to train on")

    code, error = run(fail())
    assert code == 2
    assert error.index("dropped 2 responses: 1 shorter") < error.index("error: 12 responses")


def test_an_interrupted_run_says_whether_it_can_resume(run, tmp_path):
    code, error = run(interrupted([{"step": 1, "loss": 2.0}]))
    assert code == 130
    assert "interrupted before the first checkpoint; rerunning starts over" in error
    (tmp_path / "out" / "state").mkdir(parents=True)
    code, error = run(interrupted([{"step": 1, "loss": 2.0}]))
    assert code == 130
    assert "interrupted; run the same command again to resume from the last state" in error


def test_a_backend_that_cannot_train_is_named(tmp_path, capsys):
    paths = ["--responses", str(tmp_path), "--output", str(tmp_path)]
    assert train.main([*paths, "--backend", "reference"]) == 2
    assert "backend 'reference' cannot train; use --backend cpu or cuda" in capsys.readouterr().err
