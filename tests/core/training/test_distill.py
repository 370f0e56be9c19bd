"""Responses in a file: what is requested, what is kept, and what an interruption leaves."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from byte_tokens import END
from failures import failing
from recordings import recording

from treeflash.commands import distill as command
from treeflash.config import SEEDS, SamplingConfig
from treeflash.decoding.interfaces import Prefill
from treeflash.errors import ConfigError, PromptError
from treeflash.text.output_file import OutputFile
from treeflash.text.prompt import Row
from treeflash.training.distillation import DistillConfig, mix


@pytest.fixture
def answer(byte_tokenizer):
    """The tokens of every answer: each takes two passes after the prompt's."""
    return [*byte_tokenizer.encode("ok"), END]


@pytest.fixture
def echo(scripted):
    """Make a model that gives every prompt this answer; it may be interrupted in one of them."""

    def echo(interrupt_at=None, target="target", backend="echo", dtype="float32", text="ok"):
        passes = None if interrupt_at is None else 2 * interrupt_at + 1
        model = scripted(text, drafter=False, interrupt_at=passes)
        model.backend.name, model.backend.dtype = backend, dtype
        return replace(model, folder=Path(target))

    return echo


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def distill(use, output, capsys):
    """Run the command with a model; return the exit status and standard error."""

    def distill(model, *options):
        use(model)
        capsys.readouterr()
        code = command.main(["--output", str(output), *map(str, options)])
        return code, capsys.readouterr().err

    return distill


@pytest.fixture
def prompts(tmp_path):
    """Write a row for each list of user messages; return the option that reads them."""

    def write(*conversations, name="prompts"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"id": f"r{n}", "turns": turns} for n, turns in enumerate(conversations)]
        path.write_text("\n".join(map(json.dumps, rows)))
        return "--prompts", path

    return write


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def user(text):
    return {"role": "user", "content": text}


def test_every_prompt_is_answered_and_counted(
    distill, prompts, output, echo, answer, byte_tokenizer
):
    code, error = distill(echo(), *prompts(["ab"], ["cd"]))
    assert code == 0
    assert "2 of 2 prompts answered, 6 tokens" in error
    records = {record["id"]: record for record in lines(output)}
    assert records.keys() == {"r0", "r1"}
    prompt = byte_tokenizer.chat([user("ab")])
    assert records["r0"] == {
        "id": "r0",
        "turn": 0,
        "target": "target",
        "adapter": None,
        **dict.fromkeys(("bits", "kv_bits", "exact")),
        "backend": "echo",
        "dtype": "float32",
        "top_p": 1.0,
        "max_tokens": 512,
        "temperature": 0.0,
        "seed": 0,
        "prompt_ids": prompt,
        "response_ids": answer,
    }


def test_later_turns_follow_the_responses_before_them(
    distill, prompts, output, echo, byte_tokenizer
):
    distill(echo(), *prompts(["a", "b"]))
    first, second = lines(output)
    answer = {"role": "assistant", "content": byte_tokenizer.decode(first["response_ids"])}
    assert second["turn"] == 1
    assert second["prompt_ids"] == byte_tokenizer.chat([user("a"), answer, user("b")])


def samplings(works):
    """The sampling of each text, in the order in which their prompts ran."""
    items = [item for (item,) in works if isinstance(item, Prefill)]
    return [item.params.sampling for item in items if item.params is not None]


@pytest.mark.parametrize("seeds", [(5, 6, 7), (SEEDS - 2, SEEDS - 1, 0)])
def test_temperatures_alternate_and_every_row_has_its_own_seed(seeds, distill, prompts, echo):
    model, options = echo(), ["--temperature", "0", "0.8", "--top-p", "0.7", "--seed", seeds[0]]
    with recording(model.backend, "run_one") as works:
        code, error = distill(model, *prompts(["a"], ["b"], ["c"]), *options)
    assert code == 0, error
    assert samplings(works) == [
        SamplingConfig(temperature=temperature, top_p=0.7, seed=seed)
        for temperature, seed in zip((0.0, 0.8, 0.0), seeds, strict=True)
    ]


def test_prompts_of_the_target_have_seeds_after_the_largest(distill, echo, tmp_path):
    code, error = distill(echo(), "--self-prompt", "2", "--seed", SEEDS - 1)
    assert code == 0, error
    seeds = {line["id"]: line["seed"] for line in lines(tmp_path / "out.prompts.jsonl")}
    assert seeds == {"self-0": SEEDS - 1, "self-1": 0}


def test_an_interrupted_run_resumes(distill, prompts, output, echo):
    asked = prompts(["a", "b"], ["c"], ["d", "e"])

    def answers():
        return sorted(lines(output), key=lambda record: (record["id"], record["turn"]))

    distill(echo(), *asked)
    whole = answers()
    for stop in range(5):
        output.unlink()
        code, error = distill(echo(stop), *asked, "--parallel", "1")
        assert code == 130
        assert "interrupted; run the same command again to resume" in error
        assert len(lines(output)) == stop
        with output.open("a") as file:
            file.write('{"id": "r0", "tu')  # torn in the middle of a line
        model = echo()
        assert distill(model, *asked)[0] == 0
        assert len(model.backend.prompts) == 5 - stop
        assert answers() == whole


@pytest.mark.parametrize(
    ("turns", "options", "loads"),
    [
        (["a"], [], False),
        (["a"], ["--seed", "1"], True),
        (["a"], ["--max-tokens", "4"], True),
        (["a"], ["--target", "other"], True),
        (["b"], [], True),
        (["a", "b"], [], True),
    ],
)
def test_a_finished_run_loads_no_model(
    prompts, output, tiny_pair, capsys, request, turns, options, loads
):
    def run(turns, options=()):
        asked = [*prompts(turns), "--output", output, "--target", tiny_pair[0], "--max-tokens", 3]
        return command.main([*map(str, asked), "--backend", "reference", *options])

    assert run(["a"]) == 0
    before, told = output.read_text(), capsys.readouterr().err.splitlines()[-1]
    request.getfixturevalue("nothing_loads")
    with pytest.raises(pytest.fail.Exception, match="loaded") if loads else nullcontext():
        assert run(turns, options) == 0
        assert capsys.readouterr().err == f"{told}\n"
    assert output.read_text() == before


def test_longer_prompts_are_skipped_and_named(distill, prompts, output, echo, byte_tokenizer):
    limit = len(byte_tokenizer.chat([user("b" * 20)]))
    asked = prompts(["a"], ["b" * 20], ["c" * 21, "then"], ["d", "e" * 30])
    _, error = distill(echo(), *asked, "--max-prompt-tokens", limit)
    answered = {(record["id"], record["turn"]) for record in lines(output)}
    assert answered == {("r0", 0), ("r1", 0), ("r3", 0)}
    assert "3 of 6 prompts answered, 9 tokens; skipped as too long: 2 ('r2', 'r3')" in error
    output.unlink()
    _, error = distill(echo(), *prompts(["a"], *[["b" * 90]] * 7), "--max-prompt-tokens", limit)
    assert re.search(r"too long: 7 \(('r\d', ){5}\.\.\.\)", error)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (1, "all prompts are longer than --max-prompt-tokens 1; raise it"),
        (999, "all prompts are too long for the target, which has 400 positions"),
    ],
)
def test_it_is_an_error_if_all_prompts_are_too_long(limit, message, distill, prompts, echo):
    code, error = distill(echo(), *prompts(["a" * 400], ["b" * 400]), "--max-prompt-tokens", limit)
    assert code == 2
    assert f"error: {message}" in error


def test_responses_fit_the_target(distill, prompts, output, echo):
    model = echo(text="a" * 999)
    distill(model, *prompts(["a"]), "--max-tokens", "999")
    (line,) = lines(output)
    assert len(line["prompt_ids"] + line["response_ids"]) == model.backend.max_positions


FILES = {"out": (), "out.prompts": ("--self-prompt", "2")}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out", '{"text": "mine"}\n'),
        ("out", "notes without a newline"),
        ("out", '{"id":1,"prompt":"a prompt without a newline"}'),
        ("out", '{"id":1,"turn":0,"prompt_ids":[3],"response_ids":[4]}\n'),
        ("out.prompts", '{"text": "mine"}\n'),
        ("out.prompts", "notes"),
        ("out.prompts", '{"id": "self-1", "prompt": "of nobody"}\n'),
    ],
)
def test_a_file_of_another_program_is_refused(name, content, distill, prompts, echo, tmp_path):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(content)
    code, error = distill(echo(), *(FILES[name] or prompts(["a"])))
    assert code == 2
    assert f"{name}.jsonl:1 was not written by a run like this" in error
    assert path.read_text() == content


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_another_process_writes_is_refused(name, distill, prompts, echo, tmp_path):
    path, model = tmp_path / f"{name}.jsonl", echo()
    with OutputFile(path, bool):
        code, error = distill(model, *(FILES[name] or prompts(["a"])))
    assert code == 2
    assert "is being written by another process" in error
    assert model.backend.prompts == []
    assert path.read_bytes() == b""


SETTINGS = {
    "target": ({"target": "other"}, ()),
    "backend": ({"backend": "other"}, ()),
    "dtype": ({"dtype": "bfloat16"}, ()),
    "seed": ({}, ("--seed", "1")),
    "top_p": ({}, ("--top-p", "0.9")),
    "max_tokens": ({}, ("--max-tokens", "9")),
    "temperature": ({}, ("--temperature", "0.8")),
}


@pytest.mark.parametrize(
    ("file", "name"),
    [*(("out", name) for name in SETTINGS), *(("out.prompts", name) for name in [*SETTINGS][:4])],
)
def test_other_settings_do_not_go_into_the_same_file(
    file, name, distill, prompts, output, echo, tmp_path
):
    asked = FILES[file] or prompts(["a"])
    distill(echo(), *asked)
    if file != "out":
        output.unlink()
    path = tmp_path / f"{file}.jsonl"
    before, (attributes, options) = path.read_bytes(), SETTINGS[name]
    model = echo(**attributes)
    code, error = distill(model, *(FILES[file] or prompts(["a"], ["b"])), *options)
    assert code == 2
    assert f"has lines generated with {name} " in error
    assert "--output" in error
    assert model.backend.prompts == []
    assert path.read_bytes() == before


def test_other_settings_are_refused_before_prompts_are_generated(distill, echo):
    distill(echo(), "--self-prompt", "1")
    model = echo()
    code, error = distill(model, "--self-prompt", "3", "--max-tokens", "9")
    assert code == 2
    assert "has lines generated with max_tokens 512, not 9" in error
    assert model.backend.prompts == []


def test_a_changed_prompt_does_not_count_as_answered(distill, prompts, echo):
    distill(echo(), *prompts(["a"]))
    code, error = distill(echo(), *prompts(["changed"]))
    assert code == 2
    assert "has a response to another prompt of the id 'r0'" in error


def test_a_row_that_the_template_rejects_is_named(distill, prompts, echo, byte_tokenizer):
    refused = PromptError("the chat template refuses these messages")
    with failing(byte_tokenizer, "chat", refused):
        code, error = distill(echo(), *prompts(["a"]))
    assert code == 2
    assert "the row 'r0': the chat template refuses" in error


def test_the_target_generates_the_prompts_it_answers(distill, echo, tmp_path, byte_tokenizer):
    path = tmp_path / "out.prompts.jsonl"
    assert distill(echo(interrupt_at=1), "--self-prompt", "4", "--parallel", "1")[0] == 130
    assert len(lines(path)) == 1
    with path.open("a") as file:
        file.write('{"id": "self')  # torn in the middle of a line
    model = echo()
    with recording(model.backend, "run_one") as works:
        code, error = distill(model, "--self-prompt", "4")
    assert code == 0
    assert "4 of 4 prompts answered" in error
    assert {(line["id"], line["seed"]) for line in lines(path)} == {
        (f"self-{n}", n) for n in range(4)
    }
    header = byte_tokenizer.encode("<|start|>user: ")
    assert model.backend.prompts[:3] == [header] * 3
    assert len({sampling.seed for sampling in samplings(works)[:3]}) == 3
    model = echo(interrupt_at=0)
    assert distill(model, "--self-prompt", "2")[0] == 0, "fewer prompts need no more"


def test_a_finished_run_of_own_prompts_loads_no_model(output, tiny_pair, capsys, request):
    model = ["--target", str(tiny_pair[0]), "--backend", "reference", "--max-tokens", "3"]

    def run(count):
        return command.main(["--self-prompt", str(count), "--output", str(output), *model])

    assert run(2) == 0
    told = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 2 prompts answered" in told
    request.getfixturevalue("nothing_loads")
    assert run(2) == 0
    assert capsys.readouterr().err == f"{told}\n"
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        run(3)


def test_a_target_that_writes_no_prompt_is_an_error(distill, scripted, monkeypatch):
    model = scripted("", " ", drafter=False)
    code, error = distill(model, "--self-prompt", "2")
    assert (code, "only empty prompts; use --prompts instead" in error) == (2, True)
    monkeypatch.setattr(model.tokenizer.transformers, "chat_template", None)
    code, error = distill(model, "--self-prompt", "2")
    assert (code, "has no chat template; use --prompts instead" in error) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "one of the arguments --prompts --self-prompt is required"),
        ("--prompts missing.jsonl", "missing.jsonl cannot be read"),
        ("--prompts {file} {file}", "the id 'r0' is in two files"),
        ("--prompts {file} --limit 1 --weights 1 2", "--weights needs one"),
        ("--prompts {file} --limit 1 --weights 0", "one number above 0"),
        ("--prompts {file} --limit 1 --weights nan", "one number above 0"),
        ("--prompts {file} --limit 0", "limit must be 1 or more"),
        ("--prompts {file} --weights 1", "--weights divide up the --limit"),
        ("--self-prompt 2 --limit 1", "--limit needs --prompts"),
        ("--self-prompt 0", "self-prompt must be 1 or more"),
        ("--prompts {file} --parallel 0", "parallel must be 1 or more"),
        ("--prompts {file} --temperature -1", "temperature must be 0"),
        ("--prompts {file} --backend abacus", "unknown backend 'abacus'"),
        ("--self-prompt 2 --output .", "cannot be written"),
    ],
)
def test_invalid_input_is_a_one_line_error(arguments, message, prompts, output, capsys):
    _, file = prompts(["a"])
    assert command.main(["--output", str(output), *arguments.format(file=file).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("temperature", [(), 0.5])
def test_temperatures_are_a_tuple_of_one_or_more(temperature):
    with pytest.raises(ConfigError, match="temperature must be a tuple of at least one"):
        DistillConfig(temperature=temperature)


def test_weights_share_the_limit_out():
    files = [[Row(id=f"{name}{n}", turns=()) for n in range(1000)] for name in ("a", "b")]
    chosen = mix(files, [3.0, 1.0], 400, seed=0)
    share = sum(str(row.id).startswith("a") for row in chosen) / 400
    assert 0.68 < share < 0.82
    assert chosen == mix(files, [3.0, 1.0], 400, seed=0)
    assert chosen != mix(files, [3.0, 1.0], 400, seed=1)
    everything = mix([files[0][:1], files[1][:2]], [9.0, 1.0], None, seed=0)
    assert {row.id for row in everything} == {"a0", "b0", "b1"}


@pytest.mark.parametrize("name", ["", 0])
def test_an_id_that_is_false_is_refused_in_two_files(name):
    with pytest.raises(PromptError, match=f"the id {name!r} is in two files"):
        mix([[Row(id=name, turns=())], [Row(id=name, turns=())]], [1.0, 1.0], None, seed=0)
