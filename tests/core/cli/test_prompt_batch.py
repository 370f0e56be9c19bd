"""Batches of prompts from file to file, one conversation at a time or many at once."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from batch_files import ANSWERS, KEYS, asked, keys, records
from failures import failing
from recordings import recording

from treeflash.commands.generate import main
from treeflash.decoding import loop
from treeflash.errors import NumericalError


def test_a_line_per_turn_and_the_conversation_continues(batch, files, scripted):
    model = scripted(*ANSWERS)
    code, err = batch(model)
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


@pytest.mark.parametrize("size", [1, 5, 30, -20, -1])
def test_a_torn_last_line_is_dropped(batch, files, scripted, size):
    batch(scripted(*ANSWERS))
    *first, last = files[1].read_bytes().splitlines(keepends=True)
    files[1].write_bytes(b"".join(first) + last[:size])
    assert batch(scripted(ANSWERS[3]))[0] == 0
    assert keys(files[1]) == KEYS
    assert [record["text"] for record in records(files[1])] == ANSWERS


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
def test_other_settings_are_rejected_for_the_same_file(batch, files, scripted, options, message):
    batch(scripted(*ANSWERS))
    before = files[1].read_bytes()
    code, err = batch(scripted(*ANSWERS), *options)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert files[1].read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value", "other", "folder"),
    [
        ("dtype", "float32", "bfloat16", None),
        ("backend", "scripted", "mlx", None),
        # A finished run of this target would load nothing.
        ("adapter", None, "lora", Path("SmolLM2-135M-Instruct")),
        ("bits", None, 8, Path("SmolLM2-135M-Instruct")),
        ("exact", None, False, Path("SmolLM2-135M-Instruct")),
    ],
)
def test_answers_of_another_pair_are_refused(batch, files, scripted, name, value, other, folder):
    model = replace(scripted(*ANSWERS), folder=folder)
    batch(model)
    before, after = (json.dumps({name: x})[1:-1] for x in (value, other))
    files[1].write_text(files[1].read_text().replace(before, after))
    code, err = batch(model)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{name} {other}, not {value}" in err


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(batch, files, scripted):
    files[0].write_bytes(b"\xef\xbb\xbf" + files[0].read_bytes())
    assert batch(scripted(*ANSWERS))[0] == 0
    assert keys(files[1]) == KEYS


def test_names_with_brackets_are_printed_as_they_are(batch, files, scripted):
    output = files[1].with_name("[bold]x.jsonl")
    code, err = batch(scripted(*ANSWERS), "--output", str(output))
    assert (code, "/[bold]x.jsonl: 4 of 4 turns" in err) == (0, True)


def test_a_prompt_that_cannot_be_decoded_is_reported_and_the_run_continues(batch, files, scripted):
    rows = [{"id": "long", "turns": ["x" * 500, "more"]}, {"id": "ok", "prompt": "hi"}]
    files[0].write_text("\n".join(map(json.dumps, rows)))
    code, err = batch(scripted(*ANSWERS))
    assert code == 2
    assert "1 of 3 turns decoded, 1 with errors" in err
    assert "first error, id 'long': the prompt has " in err
    long, ok = records(files[1])
    assert list(long)[:3] == ["id", "turn", "error"]
    assert "text" not in long
    assert "limit" in long["error"]
    assert ok["text"] == ANSWERS[0]
    assert batch(scripted("wrong"))[0] == 2
    assert len(records(files[1])) == 2


def test_a_fault_of_the_program_is_no_answer(batch, files, scripted):
    with failing(loop, "accept", IndexError), pytest.raises(IndexError):
        batch(scripted("An answer."))
    assert files[1].read_text() == ""


def test_an_edited_row_with_the_same_id_is_rejected(batch, files, scripted):
    batch(scripted(*ANSWERS))
    before = files[1].read_bytes()
    files[0].write_text(files[0].read_text().replace("three", "four"), encoding="utf-8")
    code, err = batch(scripted(*ANSWERS))
    assert (code, err.splitlines()[-1].count("another prompt with the id 7")) == (2, 1)
    assert files[1].read_bytes() == before


def test_a_failed_row_is_tried_again_once_it_is_fixed(batch, files, scripted):
    files[0].write_text(json.dumps({"id": 1, "prompt": "x" * 500}))
    assert batch(scripted(*ANSWERS))[0] == 2
    files[0].write_text(json.dumps({"id": 1, "prompt": "x"}))
    code, err = batch(scripted(*ANSWERS), "--max-tokens", "99")
    assert code == 0
    assert "1 of 1 turns decoded, 0 with errors" in err
    failed, fixed = records(files[1])
    assert "error" in failed
    assert fixed["text"] == ANSWERS[0]
    assert batch(scripted("wrong"), "--max-tokens", "99")[0] == 0
    assert len(records(files[1])) == 2


def test_raw_rows_need_a_single_message(batch, files, scripted):
    code, err = batch(scripted(*ANSWERS), "--raw")
    assert (code, err.count("\n")) == (2, 1)
    assert "'a' has several messages" in err
    files[0].write_text('{"id": 1, "prompt": "hi"}')
    model = scripted(*ANSWERS)
    assert batch(model, "--raw")[0] == 0
    assert asked(model, 0) == "hi"


def test_the_reference_pair_resumes_to_the_same_file(files, paths, pair_options, capsys):
    args = [*paths, "--max-tokens", "6", *pair_options]
    assert main(args) == 0
    whole = records(files[1])
    for record in whole:  # which says alone what it is
        assert (record["target"], record["drafter"]) == ("target", "drafter")
        assert record["prompt"]
        assert record["prompt_tokens"] > 0
        assert record["tokens_per_s"] > 0
    files[1].write_text("".join(json.dumps(record) + "\n" for record in whole[:2]))
    assert main(args) == 0
    again = {(r["id"], r["turn"]): r["token_ids"] for r in records(files[1])}
    assert again == {(r["id"], r["turn"]): r["token_ids"] for r in whole}
    assert len(records(files[1])) == len(whole)


def test_a_finished_file_loads_no_model(pair_options, files, paths, request, capsys):
    options = [*paths, *pair_options, "--max-tokens", "3"]
    assert main(options) == 0
    assert re.search(r"block efficiency [\d.]+, [\d.]+ tokens/s\n", capsys.readouterr().err)
    request.getfixturevalue("nothing_loads")
    before = files[1].read_bytes()
    assert main(options) == 0
    assert files[1].read_bytes() == before
    assert "turns decoded, 0 with errors" in capsys.readouterr().err
    # Other settings are refused without a model too.
    assert main([*options, "--temperature", "1"]) == 2
    assert "has lines generated with temperature 0.0, not 1.0" in capsys.readouterr().err
    for change in (["--target", "some/model"], ["--backend", "cuda"], ["--dtype", "bfloat16"]):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            main([*options, *change])


def test_conversations_are_decoded_together(batch, files, scripted):
    model = scripted(*ANSWERS)
    for parallel, most in (("1", 1), ("2", 2), ("auto", 3)):
        files[1].unlink(missing_ok=True)
        with recording(model.backend, "run") as passes:
            assert batch(model, "--parallel", parallel)[0] == 0
        assert max(len(work) for (work,) in passes) == most


@pytest.mark.sample(6)
@pytest.mark.parametrize("interrupt_at", range(1, 15, 2))
@pytest.mark.parametrize("parallel", ["1", "2", "auto"])
def test_an_interrupted_run_resumes(batch, files, scripted, interrupt_at, parallel):
    same = ["Eins, zwei, drei."]  # the next text gets it, whichever turn that is
    code, err = batch(scripted(*same, interrupt_at=interrupt_at), "--parallel", parallel)
    assert code == 130
    assert "interrupted;" in err
    assert "run the same command again to resume" in err
    found = records(files[1])
    unfinished = [record["finish_reason"] == "interrupted" for record in found]
    assert unfinished == sorted(unfinished)
    assert any(unfinished)
    for record in found:
        assert same[0].startswith(record["text"])
        assert 1 + sum(record["accepted_lengths"]) == len(record["token_ids"])
    finished = len(found) - sum(unfinished)

    model = scripted(*same)
    assert batch(model, "--parallel", parallel)[0] == 0
    assert len(model.backend.prompts) == len(KEYS) - finished
    order = list if parallel == "1" else set
    assert order(keys(files[1])) == order(KEYS)
    assert [record["text"] for record in records(files[1])] == same * len(KEYS)
    assert all(record["finish_reason"] == "stop" for record in records(files[1]))


def test_an_error_in_the_middle_ends_only_its_conversation(batch, files, scripted):
    model = scripted(*ANSWERS)
    verify = model.backend.verify

    def verify_or_fail(text, tree):
        if "three" in model.tokenizer.decode(text.prompt) and text.length > len(text.prompt) + 2:
            raise NumericalError("values are not finite")
        return verify(text, tree)

    model.backend.verify = verify_or_fail
    code, err = batch(model, "--parallel", "3")
    assert (code, "3 of 4 turns decoded, 1 with errors" in err) == (2, True)
    (failed,) = [record for record in records(files[1]) if "error" in record]
    assert (failed["id"], failed["error"]) == (7, "values are not finite")
    assert "text" not in failed
