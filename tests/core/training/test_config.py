"""The configuration of a training run, from a file and from the command line."""

import json
from dataclasses import fields

import pytest

from treeflash.commands import train
from treeflash.errors import CheckpointError, ConfigError
from treeflash.testing.models import write_drafter
from treeflash.training.config import TrainConfig, given_options, make_train_config, parse_loss


@pytest.fixture
def read(tmp_path):
    """The configuration of a TOML file's text and some arguments."""

    def read(text, *arguments):
        path = tmp_path / "train.toml"
        path.write_text(text)
        paths = ["--responses", "r", "--output", "o", "--config", str(path)]
        args = train.make_parser().parse([*paths, *arguments])
        return make_train_config(given_options(args, TrainConfig))

    return read


def test_the_command_line_overrides_the_file(read):
    text = 'steps = 7\nhead = "linear"\ntarget_layer_ids = [1, 5]\nlearning_rate = 1e-3\n'
    assert read(text, "--steps", "9") == TrainConfig(
        steps=9, head="linear", target_layer_ids=(1, 5), learning_rate=1e-3
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 7", "unknown option 'stepps'"),
        ("steps = 'many'", "steps cannot be \"many\": .*invalid int value: 'many'"),
        ("steps = true", "steps must be a number, not true"),
        ("freeze_backbone = 1", "freeze_backbone must be true or false, not 1"),
        ("steps =", "is not a valid TOML file"),
        ("steps = 0", "steps must be 1 or more"),
        ("block_size = 1", "block-size must be 2 or more"),
        ("learning_rate = nan", "learning-rate must be a finite number"),
        ("cache_gb = inf", "cache-gb must be a finite number"),
        ("seed = 9223372036854775808", "seed must be below"),
        ("marginal_weight = 0\ncorrected_weight = 0", "must not both be 0"),
        ("seed = -1", "seed must be 0 or more"),
        ("head_size = 0", "head-size must be 1 or more"),
        ("mask_token_id = -1", "mask-token-id must be 0 or more, got"),
        ("target_layer_ids = [1, -1]", "target-layer-ids must be .*0 or more, got"),
        ("target_layer_ids = []", "target_layer_ids cannot be .*expected at least one argument"),
        ("target_layer_ids = ['a']", "target_layer_ids cannot be .*invalid int value: 'a'"),
        ("loss = 'l2'", "unknown loss 'l2'"),
        ("loss = '0.1 ce + kl + ce'", "names ce twice"),
        ("loss = '0 kl'", "weight of kl must be a number above 0, got '0'"),
        ("loss = 'a kl'", "weight of kl must be a number above 0, got 'a'"),
        ("loss = 'kl +'", "unknown loss ''; choose one of kl, ce, tv, lk, or a sum"),
        ("position_weights = 'flat'", "unknown position-weights 'flat'; choose one of exponential"),
        ("head = 'cubic'", "unknown head 'cubic'; choose one of swiglu, linear, markov"),
        ("on_policy = 1.5", "on-policy must be from 0 to 1"),
        ("gamma = 0", "gamma must be above 0"),
        ("warmup = 1", "warmup must be"),
        ("freeze_backbone = true", "needs a head, and a folder as init"),
        ("freeze_layers = true", "freeze-layers needs the folder of a drafter as init"),
        ("patience = 2\nvalidation_sequences = 0", "patience needs validation; set validation-seq"),
    ],
)
def test_an_invalid_option_is_named(text, message, read):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_an_existing_drafter_keeps_its_shape_and_its_head(tiny_pair, tmp_path):
    target, drafter = tiny_pair
    init = {"init": str(drafter)}
    # Equal values are accepted, so that one file can serve both runs.
    assert make_train_config(init).init == init["init"]
    assert make_train_config({**init, "layers": 2, "target_layer_ids": (0, 2)}).layers == 2
    for name, value in (("layers", 1), ("block_size", 16), ("target_layer_ids", (1,))):
        with pytest.raises(ConfigError, match=f"has {name.replace('_', '-')} .*; leave it out"):
            make_train_config({**init, name: value})
    assert make_train_config({**init, "layers": 5}).layers == 5  # three are appended
    with pytest.raises(CheckpointError):
        make_train_config({"init": str(tmp_path)})
    write_drafter(tmp_path / "linear", target, seed=2, head="linear")
    write_drafter(tmp_path / "dflash", target, seed=2, format="dflash")
    init = {"init": str(tmp_path / "linear")}
    assert make_train_config(init).head == "linear"
    assert make_train_config({**init, "head": "swiglu"}).head == "swiglu"
    assert make_train_config({"init": str(tmp_path / "dflash")}).head == "swiglu"


def test_every_option_has_a_help_text_and_reaches_the_configuration(tmp_path, capsys):
    assert all(field.metadata["help"] for field in fields(TrainConfig))
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"--{field.name.replace('_', '-')} " in shown for field in fields(TrainConfig))
    responses = tmp_path / "responses.jsonl"
    responses.write_text(json.dumps({"prompt_ids": [1], "response_ids": [2]}))
    arguments = ["--responses", str(responses), "--output", str(tmp_path / "out")]
    assert train.main([*arguments, "--target-layer-ids", "1", "2", "--gamma", "-1"]) == 2
    assert "gamma must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("kl", {"kl": 1}),
        ("0.1 ce + 0.9 tv", {"ce": 0.1, "tv": 0.9}),
        ("lk+2 kl", {"lk": 1, "kl": 2}),
    ],
)
def test_a_loss_is_a_weighted_sum(text, weights):
    assert parse_loss(text) == weights


def test_no_layers_are_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="target-layer-ids must be at least one number, each 0"):
        TrainConfig(target_layer_ids=())
