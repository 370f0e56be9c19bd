"""Training: the command line and its model card, the settings, and files of responses."""

import json
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
from byte_tokens import END

from treeflash.commands import train
from treeflash.drafters.folder import read_config
from treeflash.errors import CheckpointError, ConfigError, PromptError
from treeflash.testing.models import write_drafter
from treeflash.training.config import TrainConfig, given_options, make_train_config, parse_loss
from treeflash.training.distillation import Response, foreign_responses, read_responses
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


def test_an_output_that_is_a_file_is_refused_before_anything_is_read(tmp_path, capsys):
    output = tmp_path / "out"
    output.write_text("prompts")
    assert train.main(["--responses", "missing.jsonl", "--output", str(output)]) == 2
    message = f"error: {output} cannot be written: Not a directory\n"
    assert capsys.readouterr().err == message
    assert output.read_text() == "prompts"


def test_no_layers_are_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="target-layer-ids must be at least one number, each 0"):
        TrainConfig(target_layer_ids=())


def write(tmp_path, *records):
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_token_ids_are_used_unchanged(tmp_path, byte_tokenizer):
    path = write(tmp_path, {"id": 1, "prompt_ids": [3, 4], "response_ids": [5], "more": "free"})
    (response,) = read_responses(path, byte_tokenizer)
    assert response == Response(prompt_ids=(3, 4), response_ids=(5,))
    assert response.token_ids == (3, 4, 5)
    assert len(response) == 3


def test_answers_of_another_model_are_warned_of(tmp_path, byte_tokenizer):
    ids = {"prompt_ids": [3], "response_ids": [5]}
    names = ("Qwen/Qwen3-4B", "mlx-community/Qwen3-4B-4bit", "a/other", "a/other")
    path = write(tmp_path, ids, *({**ids, "target": name} for name in names))
    responses = read_responses(path, byte_tokenizer)
    assert [response.truncate(1).target for response in responses] == [None, *names]
    (line,) = foreign_responses(responses, tmp_path / "Qwen3-4B")
    assert line.startswith("warning: 2 of 5 responses were written by a/other, not by the target ")
    assert foreign_responses(responses[:3], tmp_path / "Qwen3-4B") == []


def test_a_conversation_goes_through_the_chat_template(tmp_path, byte_tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (response,) = read_responses(write(tmp_path, {"messages": messages}), byte_tokenizer)
    assert list(response.prompt_ids) == byte_tokenizer.chat(messages[:1])
    assert list(response.response_ids[:-1]) == byte_tokenizer.encode("ho")
    assert response.response_ids[-1] in byte_tokenizer.stop_token_ids
    assert response.response_ids[-1] == END


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "needs 'messages', or 'prompt_ids' and 'response_ids'"),
        ({"prompt_ids": [1], "response_ids": []}, "as lists of token ids"),
        ({"prompt_ids": [1], "response_ids": [True]}, "as lists of token ids"),
        ({"prompt_ids": [1], "response_ids": ["a"]}, "as lists of token ids"),
        ({"prompt_ids": [-1], "response_ids": [2]}, "as lists of token ids"),
        ({"messages": "hi"}, "must be a non-empty list"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "non-empty message of the assistant"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "non-empty message"),
    ],
)
def test_an_invalid_line_is_named(record, message, tmp_path, byte_tokenizer):
    good = {"prompt_ids": [1], "response_ids": [2]}
    with pytest.raises(PromptError, match=r"responses\.jsonl:2: .*" + message):
        read_responses(write(tmp_path, good, record), byte_tokenizer)


def test_a_byte_order_mark_is_ignored(tmp_path, byte_tokenizer):
    path = write(tmp_path, {"prompt_ids": [1], "response_ids": [2]})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(read_responses(path, byte_tokenizer)) == 1


def test_an_empty_file_is_refused(tmp_path, byte_tokenizer):
    with pytest.raises(PromptError, match="has no responses"):
        read_responses(write(tmp_path), byte_tokenizer)


def test_truncation_keeps_the_prompt():
    response = Response(prompt_ids=(1, 2), response_ids=(3, 4, 5))
    assert response.truncate(4).response_ids == (3, 4)
    assert response.truncate(9) == response
    assert response.truncate(1).response_ids == ()
