"""Many conversations at once, from file to file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from batch_files import ANSWERS, KEYS, keys, records
from processes import WITHOUT_FRAMEWORKS
from recordings import recording

from treeflash.commands.generate import main
from treeflash.errors import NumericalError

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
    """A process that answers `MANY` with several options; started with the extra arguments."""
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


# The conformance suite and the schedules have the law, without the command.
@pytest.mark.nightly
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


def test_conversations_are_decoded_together(run, files, scripted):
    model = scripted(*ANSWERS)
    for parallel, most in (("1", 1), ("2", 2), ("auto", 3)):
        files[1].unlink(missing_ok=True)
        with recording(model.backend, "run") as passes:
            assert run(model, "--parallel", parallel)[0] == 0
        assert max(len(work) for (work,) in passes) == most


@pytest.mark.sample(4)
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


def test_an_error_in_the_middle_ends_only_its_conversation(run, files, scripted):
    model = scripted(*ANSWERS)
    verify = model.backend.verify

    def verify_or_fail(text, tree):
        if "three" in model.tokenizer.decode(text.prompt) and text.length > len(text.prompt) + 2:
            raise NumericalError("values are not finite")
        return verify(text, tree)

    model.backend.verify = verify_or_fail
    code, err = run(model, "--parallel", "3")
    assert (code, "3 of 4 turns decoded, 1 with errors" in err) == (2, True)
    (failed,) = [record for record in records(files[1]) if "error" in record]
    assert (failed["id"], failed["error"]) == (7, "values are not finite")
    assert "text" not in failed


INTERRUPT_AFTER_THE_FIRST_TEXT = """
import os, signal, sys
from pathlib import Path
from treeflash.commands.generate import main
from treeflash.reference.verifier import Verifier

run_target = Verifier.run

def run(self, work):
    if Path({!r}).stat().st_size:
        os.kill(os.getpid(), signal.SIGINT)
    return run_target(self, work)

Verifier.run = run
# A shell lets its background jobs ignore it, and what they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


# A process; `test_prompt_batch.py` has interrupted runs that resume, in this one.
@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a process on Windows")
def test_sigint_loses_no_finished_text_and_resumes(files, many):
    code = WITHOUT_FRAMEWORKS + INTERRUPT_AFTER_THE_FIRST_TEXT.format(str(files[1]))
    command = [sys.executable, "-c", code, *many("--parallel", "3")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (130, False), done.stderr
    kept = answers(files[1])
    assert 0 < len(kept) < len(MANY_KEYS)
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
    assert f"must be auto or a number of sequences, got {value}" in err


@pytest.mark.usefixtures("nothing_loads")
def test_parallel_is_for_many_prompts(capsys):
    assert main(["--parallel", "2", "hi"]) == 2
    assert "--parallel needs --prompts" in capsys.readouterr().err
