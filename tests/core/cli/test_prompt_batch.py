"""Batches of prompts, from file to file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from batch_files import ANSWERS, KEYS, asked, keys, records
from failures import failing
from processes import WITHOUT_FRAMEWORKS

from treeflash.commands.generate import main
from treeflash.decoding import loop


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


@pytest.mark.sample(3)
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


def test_answers_with_another_adapter_are_not_those_of_a_finished_run(run, files, scripted):
    model = replace(scripted(*ANSWERS), folder=Path("SmolLM2-135M-Instruct"))
    run(model)
    files[1].write_text(files[1].read_text().replace('"adapter": null', '"adapter": "lora"'))
    code, err = run(model)
    assert (code, err.count("\n")) == (2, 1)
    assert "adapter lora, not None" in err


def test_a_second_run_into_the_same_file_is_refused(run, files, scripted):
    model = scripted(*ANSWERS)
    verify = model.backend.verify
    second: list[int] = []

    def verify_beside_a_second_run(*args):
        if not second:
            second.append(main(["--prompts", str(files[0]), "--output", str(files[1])]))
        return verify(*args)

    model.backend.verify = verify_beside_a_second_run
    code, err = run(model)
    assert (code, second) == (0, [2])
    assert "is being written by another process" in err
    assert [record["text"] for record in records(files[1])] == ANSWERS


@pytest.mark.skipif(sys.platform == "win32", reason="no such devices on Windows")
@pytest.mark.usefixtures("nothing_loads")
def test_an_output_must_be_a_regular_file(files, capsys):
    assert main(["--prompts", str(files[0]), "--output", os.devnull]) == 2
    assert "not a regular file" in capsys.readouterr().err


# A process; `test_output_file.py` has a file that cannot grow, in this one.
@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="no such limits on Windows")
def test_an_output_that_cannot_grow_is_named(files, tiny_pair):
    target, drafter = map(str, tiny_pair)
    models = ["--backend", "reference", "--target", target, "--drafter", drafter]
    args = ["--prompts", str(files[0]), "--output", str(files[1]), "--max-tokens", "6", *models]
    code = f"""{WITHOUT_FRAMEWORKS}
import resource
from treeflash.commands.generate import main
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


def test_a_fault_of_the_program_is_no_answer(run, files, scripted):
    with failing(loop, "accept", IndexError), pytest.raises(IndexError):
        run(scripted("An answer."))
    assert files[1].read_text() == ""


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


def test_a_finished_file_loads_no_model(tiny_pair, files, request, capsys):
    target, drafter = map(str, tiny_pair)
    models = ["--backend", "reference", "--target", target, "--drafter", drafter]
    paths = ["--prompts", str(files[0]), "--output", str(files[1]), "--max-tokens", "3"]
    assert main([*models, *paths]) == 0
    assert re.search(r"block efficiency [\d.]+, [\d.]+ tokens/s\n", capsys.readouterr().err)
    request.getfixturevalue("nothing_loads")
    assert main([*models, *paths]) == 0
    assert "turns decoded, 0 with errors" in capsys.readouterr().err
    # Other settings are refused without a model too.
    assert main([*models, *paths, "--temperature", "1"]) == 2
    assert "has lines generated with temperature 0.0, not 1.0" in capsys.readouterr().err
    for change in (["--target", "some/model"], ["--backend", "cuda"], ["--dtype", "bfloat16"]):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            main([*models, *paths, *change])


def test_lines_can_be_read_alone(tiny_pair, files):
    target, drafter = map(str, tiny_pair)
    models = ["--backend", "reference", "--target", target, "--drafter", drafter]
    paths = ["--prompts", str(files[0]), "--output", str(files[1]), "--max-tokens", "3"]
    assert main([*models, *paths]) == 0
    records = [json.loads(line) for line in files[1].read_text(encoding="utf-8").splitlines()]
    for record in records:
        assert (record["target"], record["drafter"]) == ("target", "drafter")
        assert record["prompt"]
        assert record["prompt_tokens"] > 0
        assert record["tokens_per_s"] > 0
