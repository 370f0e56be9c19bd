"""The command line of train, and the model card of what it trained."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from treeflash.commands import train
from treeflash.drafters.folder import read_config
from treeflash.errors import ConfigError
from treeflash.testing.models import write_drafter
from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import model_card


@pytest.fixture
def run(monkeypatch, tiny_pair, tmp_path, capsys):
    """Run the command with a trainer that yields records: exit status and standard error."""
    responses = tmp_path / "responses.jsonl"
    responses.write_text('{"prompt_ids": [1], "response_ids": [2], "target": "a/other"}')
    folders = ["--target", tiny_pair[0], "--output", tmp_path / "out"]

    def run(records, *arguments):
        monkeypatch.setattr(train, "trainer", lambda _: SimpleNamespace(train=lambda *_: records))
        capsys.readouterr()
        code = train.main(["--responses", str(responses), *map(str, folders), *arguments])
        return code, capsys.readouterr().err

    return run


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
    assert "warning: 1 of 1 responses were written by a/other, not by the target target;" in error


@pytest.mark.parametrize(
    ("records", "options", "shown"),
    [
        ([], ["--steps", "7"], "7/7"),  # the run had finished before
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], ["--minutes", "1"], "2/10000"),
    ],
)
def test_the_bar_shows_the_steps_at_the_end(records, options, shown, run):
    code, error = run(iter(records), *options)
    assert code == 0
    assert shown in error
    assert "10000/10000" not in error
    assert "out: trained; pass it as --drafter" in error


def test_dropped_responses_are_counted_before_an_error(run):
    def fail():
        yield {"too_short": 1, "too_long": 1}
        raise ConfigError("12 responses leave nothing to train on")

    code, error = run(fail())
    assert code == 2
    assert error.index("dropped 2 responses: 1 shorter") < error.index("error: 12 responses")


def test_an_interrupted_run_says_whether_it_can_resume(run, tmp_path):
    def interrupted():
        yield {"step": 1, "loss": 2.0}
        raise KeyboardInterrupt

    code, error = run(interrupted())
    assert code == 130
    assert "interrupted before the first checkpoint; rerunning starts over" in error
    (tmp_path / "out" / "state").mkdir(parents=True)
    code, error = run(interrupted())
    assert code == 130
    assert "interrupted; run the same command again to resume from the last state" in error


def test_a_backend_that_cannot_train_is_named(tmp_path, capsys):
    paths = ["--responses", str(tmp_path), "--output", str(tmp_path)]
    assert train.main([*paths, "--backend", "reference"]) == 2
    assert "backend 'reference' cannot train; use --backend cpu or cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layers", "shown"),
    [(1, ("1 layer, hidden", "target layer 0.")), (2, ("2 layers, h", "target layers 0, 1."))],
)
def test_a_model_card_has_one_layer_or_several_layers(layers, shown, tiny_pair, tmp_path):
    write_drafter(
        tmp_path, tiny_pair[0], seed=1, layers=layers, target_layer_ids=tuple(range(layers))
    )
    identity = {**asdict(TrainConfig()), "data": "0"}
    card = " ".join(model_card(read_config(tmp_path), identity, []).split())
    assert all(part in card for part in shown)
