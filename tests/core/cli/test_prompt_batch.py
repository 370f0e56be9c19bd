"""Batches of prompts, from file to file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from treeflash.cli import options
from treeflash.errors import NumericalError, PromptError
from treeflash.generate import main
from treeflash.text.prompt_file import read_rows

ROWS = [
    {"id": "a", "category": "x", "turns": ["one", "two"]},
    {"id": 7, "prompt": "three"},
    {
        "id": "c",
        "messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "4"}],
    },
]
ANSWERS = ["Eins, zwei.", "Drei é vier.", "Fünf.", "Sechs, sieben, acht."]
KEYS = [("a", 0), ("a", 1), (7, 0), ("c", 0)]


@pytest.fixture
def files(tmp_path):
    """The paths of a prompt file and of the output."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return prompts, tmp_path / "out.jsonl"


@pytest.fixture
def run(files, monkeypatch, capsys):
    """Run the batch with a model: exit status and standard error.

    Unless arguments say otherwise, one conversation at a time, so that the order is known.
    """

    def run(model, *args: str) -> tuple[int, str]:
        monkeypatch.setattr(options, "load", lambda *a, **k: model)
        capsys.readouterr()
        paths = ["--prompts", str(files[0]), "--output", str(files[1])]
        code = main([*paths, "--parallel", "1", *args])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return run


def records(path) -> list[dict]:
    """The lines of an output file."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def keys(path) -> list[tuple]:
    """The turns in an output file."""
    return [(record["id"], record["turn"]) for record in records(path)]


def asked(model, number: int) -> str:
    """One of the model's prompts, as text."""
    return model.tokenizer.decode(model.backend.prompts[number])


def test_a_line_per_turn_and_the_conversation_continues(run, files, scripted):
    model = scripted(*ANSWERS)
    code, err = run(model)
    assert code == 0
    assert "4 of 4 turns decoded, 0 with errors, block efficiency" in err
    assert keys(files[1]) == KEYS
    assert [record["text"] for record in records(files[1])] == ANSWERS
    expected = scripted(ANSWERS[0]).generate("one").to_dict()
    first = records(files[1])[0]
    assert list(first)[: 2 + len(expected)] == ["id", "turn", *expected]
    assert (first["target"], first["temperature"], first["stop"]) == (None, 0.0, [])
    assert asked(model, 1) == "user: oneassistant: Eins, zwei.user: twoassistant: "
    assert asked(model, 3) == "system: Be.user: 4assistant: "


def test_finished_turns_are_not_decoded_again(run, files, scripted):
    run(scripted(*ANSWERS))
    before = files[1].read_bytes()
    model = scripted("wrong")
    code, err = run(model)
    assert code == 0
    assert "4 of 4 turns decoded" in err
    assert model.backend.prompts == []
    assert files[1].read_bytes() == before


@pytest.mark.parametrize("interrupt_at", range(1, 15, 2))
def test_an_interrupted_run_resumes(run, files, scripted, interrupt_at):
    whole = scripted(*ANSWERS)
    run(whole)
    reference = [record["text"] for record in records(files[1])]
    assert whole.backend.verified >= 14
    files[1].unlink()

    code, err = run(scripted(*ANSWERS, interrupt_at=interrupt_at))
    assert code == 130
    assert "interrupted;" in err
    assert "run the same command again to resume" in err
    *finished, last = records(files[1])
    assert last["finish_reason"] == "interrupted"
    assert 1 + sum(last["accepted_lengths"]) == len(last["token_ids"])
    assert ANSWERS[len(finished)].startswith(last["text"])

    model = scripted(*ANSWERS[len(finished) :])
    assert run(model)[0] == 0
    assert len(model.backend.prompts) == len(ANSWERS) - len(finished)
    assert keys(files[1]) == KEYS
    assert [record["text"] for record in records(files[1])] == reference
    assert all(record["finish_reason"] == "stop" for record in records(files[1]))


@pytest.mark.parametrize("size", [1, 5, 30, -20, -1])
def test_a_torn_last_line_is_dropped(run, files, scripted, size):
    run(scripted(*ANSWERS))
    *first, last = files[1].read_bytes().splitlines(keepends=True)
    files[1].write_bytes(b"".join(first) + last[:size])
    assert run(scripted(ANSWERS[3]))[0] == 0
    assert keys(files[1]) == KEYS
    assert [record["text"] for record in records(files[1])] == ANSWERS


def test_a_file_of_something_else_is_left_alone(run, files, scripted):
    for content in (
        "notes without a newline",
        '{"id": 1, "prompt": "a prompt without a newline"}',
        '{"id": 1}\n',
        '{"id": "a", "turn": 0, "te\n',
        "[]\n",
        "[" * 100000 + "\n",
        '{"id": 1, "turn": 0}\n',
    ):
        files[1].write_text(content)
        code, err = run(scripted(*ANSWERS))
        assert (code, err.count("\n")) == (2, 1)
        assert "give another --output" in err
        assert files[1].read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "8"], "budget auto, not 8"),
        (["--temperature", "0.5"], "temperature 0.0, not 0.5"),
        (["--max-tokens", "9"], "max_tokens 256, not 9"),
        (["--stop", "x"], "stop [], not ['x']"),
        (["--system", "Be brief."], "system None, not Be brief."),
        (["--method", "ddtree"], "method treeflash, not ddtree"),
        (["--top-k", "5"], "top_k 0, not 5"),
        (["--top-p", "0.5"], "top_p 1.0, not 0.5"),
        (["--min-p", "0.1"], "min_p 0.0, not 0.1"),
        (["--seed", "3"], "seed 0, not 3"),
        (["--chat-template-args", "{}"], "template_args None, not {}"),
    ],
)
def test_other_settings_are_rejected_for_the_same_file(run, files, scripted, options, message):
    run(scripted(*ANSWERS))
    before = files[1].read_bytes()
    code, err = run(scripted(*ANSWERS), *options)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert files[1].read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"), [("dtype", "bfloat16"), ("name", "mlx")], ids=["dtype", "backend"]
)
def test_another_dtype_or_backend_is_rejected_for_the_same_file(run, files, scripted, name, value):
    run(scripted(*ANSWERS))
    model = scripted(*ANSWERS)
    setattr(model.backend, name, value)
    code, err = run(model)
    assert (code, err.count("\n")) == (2, 1)
    assert f"not {value}" in err


def test_a_second_run_into_the_same_file_is_refused(run, files, scripted, monkeypatch):
    model = scripted(*ANSWERS)
    verify = model.backend.verify
    second: list[int] = []

    def verify_beside_a_second_run(*args):
        if not second:
            second.append(main(["--prompts", str(files[0]), "--output", str(files[1])]))
        return verify(*args)

    monkeypatch.setattr(model.backend, "verify", verify_beside_a_second_run)
    code, err = run(model)
    assert (code, second) == (0, [2])
    assert "is being written by another process" in err
    assert [record["text"] for record in records(files[1])] == ANSWERS


@pytest.mark.skipif(sys.platform == "win32", reason="no such devices on Windows")
def test_an_output_must_be_a_regular_file(files, monkeypatch, capsys):
    monkeypatch.setattr(options, "load", lambda *a, **k: pytest.fail("loaded"))
    assert main(["--prompts", str(files[0]), "--output", os.devnull]) == 2
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits on Windows")
def test_an_output_that_cannot_grow_is_named(files, tiny_pair):
    target, drafter = map(str, tiny_pair)
    models = ["--backend", "reference", "--target", target, "--drafter", drafter]
    args = ["--prompts", str(files[0]), "--output", str(files[1]), "--max-tokens", "6", *models]
    code = f"""
import resource
from treeflash.generate import main
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
raise SystemExit(main({args!r}))
"""
    # -B: Python would leave modules' bytecode that the limit has cut off.
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: {files[1]} cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(run, files, scripted):
    files[0].write_bytes(b"\xef\xbb\xbf" + files[0].read_bytes())
    assert run(scripted(*ANSWERS))[0] == 0
    assert keys(files[1]) == KEYS


def test_a_prompt_that_cannot_be_decoded_is_reported_and_the_run_continues(run, files, scripted):
    rows = [{"id": "long", "turns": ["x" * 500, "more"]}, {"id": "ok", "prompt": "hi"}]
    files[0].write_text("\n".join(map(json.dumps, rows)))
    code, err = run(scripted(*ANSWERS))
    assert code == 2
    assert "1 of 3 turns decoded, 1 with errors" in err
    long, ok = records(files[1])
    assert list(long)[:3] == ["id", "turn", "error"]
    assert "text" not in long
    assert "limit" in long["error"]
    assert ok["text"] == ANSWERS[0]
    assert run(scripted("wrong"))[0] == 2
    assert len(records(files[1])) == 2


def test_an_edited_row_with_the_same_id_is_rejected(run, files, scripted):
    run(scripted(*ANSWERS))
    before = files[1].read_bytes()
    files[0].write_text(files[0].read_text().replace("three", "four"), encoding="utf-8")
    code, err = run(scripted(*ANSWERS))
    assert (code, err.splitlines()[-1].count("another prompt with the id 7")) == (2, 1)
    assert files[1].read_bytes() == before


def test_a_failed_row_is_tried_again_once_it_is_fixed(run, files, scripted):
    files[0].write_text(json.dumps({"id": 1, "prompt": "x" * 500}))
    assert run(scripted(*ANSWERS))[0] == 2
    files[0].write_text(json.dumps({"id": 1, "prompt": "x"}))
    code, err = run(scripted(*ANSWERS), "--max-tokens", "99")
    assert code == 0
    assert "1 of 1 turns decoded, 0 with errors" in err
    failed, fixed = records(files[1])
    assert "error" in failed
    assert fixed["text"] == ANSWERS[0]
    assert run(scripted("wrong"), "--max-tokens", "99")[0] == 0
    assert len(records(files[1])) == 2


def test_raw_rows_need_a_single_message(run, files, scripted):
    code, err = run(scripted(*ANSWERS), "--raw")
    assert (code, err.count("\n")) == (2, 1)
    assert "'a' has several messages" in err
    files[0].write_text('{"id": 1, "prompt": "hi"}')
    model = scripted(*ANSWERS)
    assert run(model, "--raw")[0] == 0
    assert asked(model, 0) == "hi"


def test_the_reference_pair_resumes_to_the_same_file(files, tiny_pair, capsys):
    target, drafter = map(str, tiny_pair)
    models = ["--backend", "reference", "--target", target, "--drafter", drafter]
    args = ["--prompts", str(files[0]), "--output", str(files[1]), "--max-tokens", "6", *models]
    assert main(args) == 0
    whole = records(files[1])
    files[1].write_text("".join(json.dumps(record) + "\n" for record in whole[:2]))
    assert main(args) == 0
    again = {(r["id"], r["turn"]): r["token_ids"] for r in records(files[1])}
    assert again == {(r["id"], r["turn"]): r["token_ids"] for r in whole}
    assert len(records(files[1])) == len(whole)


MANY = [
    {"id": "long", "turns": ["first", "x" * 6000, "never asked"]},
    {"id": "talk", "turns": ["one", "two", "three"]},
    *({"id": n, "prompt": "word " * n} for n in range(1, 6)),
    {"id": "last", "turns": ["one", "four"]},
]
MANY_KEYS = {("long", 0), ("long", 1), ("last", 0), ("last", 1)}
MANY_KEYS |= {("talk", turn) for turn in range(3)} | {(n, 0) for n in range(1, 6)}


@pytest.fixture
def many(files, tiny_pair):
    """A process that answers `MANY` with several options; started with its further arguments."""
    files[0].write_text("\n".join(map(json.dumps, MANY)))
    paths = ["--prompts", str(files[0]), "--output", str(files[1])]
    target, drafter = map(str, tiny_pair)
    models = ["--backend", "reference", "--target", target, "--drafter", drafter]
    options = ["--max-tokens", "30", "--temperature", "1", "--stop", "a", "--stop", "Q"]

    def arguments(*args: str) -> list[str]:
        return [*paths, *models, *options, *args]

    return arguments


def answers(path) -> dict[tuple, tuple]:
    """What the output says about each turn, apart from times."""
    return {
        (r["id"], r["turn"]): (r.get("text"), r.get("token_ids"), r.get("error"))
        for r in records(path)
        if r.get("finish_reason") != "interrupted"
    }


def test_the_texts_are_the_same_however_many_are_decoded_at_once(files, many, capsys):
    found = []
    for parallel in ("1", "2", "3", "auto"):
        assert main(many("--budget", "6", "--parallel", parallel)) == 2
        assert len(keys(files[1])) == len(MANY_KEYS)
        found.append(answers(files[1]))
        order = [turn for name, turn in keys(files[1]) if name == "talk"]
        assert order == [0, 1, 2]
        files[1].unlink()
    assert found[0].keys() == MANY_KEYS
    assert all(other == found[0] for other in found)
    assert "limit" in found[0]["long", 1][2]
    ends = [record[0] for record in found[0].values() if record[0] is not None]
    assert len({len(text) for text in ends}) > 2, "no text ended before the others"
    assert "11 of 13 turns decoded, 1 with errors" in capsys.readouterr().err


def test_conversations_are_decoded_together(run, files, scripted, monkeypatch):
    model = scripted(*ANSWERS)
    together = []
    run_target = model.backend.run

    def noted(work):
        together.append(len(work))
        return run_target(work)

    monkeypatch.setattr(model.backend, "run", noted)
    for parallel, most in (("1", 1), ("2", 2), ("auto", 3)):
        together.clear()
        files[1].unlink(missing_ok=True)
        assert run(model, "--parallel", parallel)[0] == 0
        assert max(together) == most


@pytest.mark.parametrize("interrupt_at", range(1, 15, 2))
@pytest.mark.parametrize("parallel", ["2", "auto"])
def test_an_interrupted_run_of_several_conversations_resumes(
    run, files, scripted, interrupt_at, parallel
):
    same = ["Eins, zwei, drei."]  # the next text gets it, whichever turn that is
    assert run(scripted(*same, interrupt_at=interrupt_at), "--parallel", parallel)[0] == 130
    found = records(files[1])
    unfinished = [record["finish_reason"] == "interrupted" for record in found]
    assert unfinished == sorted(unfinished)
    assert any(unfinished)
    for record in found:
        assert same[0].startswith(record["text"])
        assert 1 + sum(record["accepted_lengths"]) == len(record["token_ids"])
    finished = len(found) - sum(unfinished)

    model = scripted(*same)
    assert run(model, "--parallel", parallel)[0] == 0
    assert len(model.backend.prompts) == len(KEYS) - finished
    assert sorted(map(str, keys(files[1]))) == sorted(map(str, KEYS))
    assert [record["text"] for record in records(files[1])] == same * len(KEYS)
    assert all(record["finish_reason"] == "stop" for record in records(files[1]))


def test_an_error_in_the_middle_ends_only_its_conversation(run, files, scripted, monkeypatch):
    model = scripted(*ANSWERS)
    verify = model.backend.verify

    def verify_or_fail(text, tree):
        if "three" in model.tokenizer.decode(text.prompt) and text.length > len(text.prompt) + 2:
            raise NumericalError("values are not finite")
        return verify(text, tree)

    monkeypatch.setattr(model.backend, "verify", verify_or_fail)
    code, err = run(model, "--parallel", "3")
    assert (code, "3 of 4 turns decoded, 1 with errors" in err) == (2, True)
    (failed,) = [record for record in records(files[1]) if "error" in record]
    assert (failed["id"], failed["error"]) == (7, "values are not finite")
    assert "text" not in failed
    monkeypatch.undo()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a process on Windows")
def test_sigint_loses_no_finished_text_and_resumes(files, many):
    command = [sys.executable, "-m", "treeflash.generate", *many("--parallel", "3")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (files[1].exists() and files[1].stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert (process.returncode, "Traceback" in err) == (130, False)
    kept = answers(files[1])
    assert kept
    assert main(many("--parallel", "3")) == 2
    whole = answers(files[1])
    assert whole.keys() == MANY_KEYS
    assert kept.items() <= whole.items()
    files[1].unlink()
    assert main(many("--parallel", "1")) == 2
    assert answers(files[1]) == whole


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_bad_number_of_conversations_is_one_line(run, scripted, value):
    code, err = run(scripted(*ANSWERS), f"--parallel={value}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"neither auto nor a number of texts: {value}" in err


def test_parallel_is_for_many_prompts(monkeypatch, capsys):
    monkeypatch.setattr(options, "load", lambda *a, **k: pytest.fail("loaded"))
    assert main(["--parallel", "2", "hi"]) == 2
    assert "--parallel is for --prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a JSON object with an id"),
        ("[" * 100000, "recursion"),
        ('{"prompt": "x"}', "needs an 'id'"),
        ('{"id": null, "prompt": "x"}', "needs an 'id'"),
        ('{"id": true, "prompt": "x"}', "needs an 'id'"),
        ('{"id": 1}', "exactly one of"),
        ('{"id": 1, "prompt": "x", "turns": ["x"]}', "exactly one of"),
        ('{"id": 1, "prompt": 3}', "'prompt' must be a string"),
        ('{"id": 1, "turns": []}', "'turns' must be a non-empty list of strings"),
        ('{"id": 1, "turns": "x"}', "'turns' must be a non-empty list of strings"),
        ('{"id": "\\ud800", "prompt": "x"}', "not valid Unicode"),
        (
            '{"id": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
            "not valid Unicode",
        ),
        ('{"id": 1, "prompt": "\\ud800"}', "not valid Unicode"),
        ('{"id": 1, "messages": []}', "'messages' must be a non-empty list"),
        ('{"id": 1, "messages": [{"role": "user"}]}', "message 1 needs"),
        ('{"id": "first", "prompt": "x"}', "'first' is already used on line 1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "first", "prompt": "x"}\n\n' + line + "\n")
    with pytest.raises(PromptError, match=message) as raised:
        read_rows(path)
    assert str(raised.value).startswith(f"{path}:3: ")
