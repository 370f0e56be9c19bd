"""The command line of distill."""

import json

import pytest
from distilled import check_plain_decoding

from treeflash.commands import distill
from treeflash.training.distillation import response_file


@pytest.fixture
def files(tmp_path):
    """A file of two prompts, and the output."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": 1, "prompt": "hi"}\n{"id": 2, "prompt": "ho"}\n')
    return prompts, tmp_path / "out.jsonl"


@pytest.fixture
def run(monkeypatch, files, capsys):
    """Run the command with a model: exit status and standard error."""

    def run(model, *arguments):
        monkeypatch.setattr(distill, "load_model", lambda args, drafter: model)
        capsys.readouterr()
        code = distill.main(["--output", str(files[1]), *arguments])
        return code, capsys.readouterr().err

    return run


def test_prompts_are_answered_and_counted(run, files, echo):
    code, error = run(echo(), "--prompts", str(files[0]), "--top-p", "0.5", "--temperature", "1")
    assert code == 0
    assert "2 of 2 prompts answered, 6 tokens" in error
    records = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert {(record["id"], record["top_p"]) for record in records} == {(1, 0.5), (2, 0.5)}


def test_an_interrupted_run_says_how_to_resume(run, files, echo):
    code, error = run(echo(interrupt_at=1), "--prompts", str(files[0]), "--parallel", "1")
    assert code == 130
    assert "interrupted; run the same command again to resume" in error
    assert "2 of 2 prompts answered" in run(echo(), "--prompts", str(files[0]))[1]


def test_the_target_generates_the_prompts_it_answers(run, files, echo):
    code, error = run(echo(), "--self-prompt", "3")
    assert code == 0
    assert "3 of 3 prompts answered" in error
    assert len(files[1].with_suffix(".prompts.jsonl").read_text().splitlines()) == 3


def test_other_settings_are_refused_before_prompts_are_generated(run, files, echo):
    run(echo(), "--self-prompt", "1")
    model = echo()
    code, error = run(model, "--self-prompt", "3", "--max-tokens", "9")
    assert code == 2
    assert "has lines generated with max_tokens 512, not 9" in error
    assert model.backend.asked == []


def test_too_long_prompts_are_an_error_if_nothing_is_left(run, files, echo):
    code, error = run(echo(), "--prompts", str(files[0]), "--max-prompt-tokens", "1")
    assert code == 2
    assert "error: all prompts are longer than --max-prompt-tokens 1; raise it" in error


def test_two_processes_do_not_write_one_output(run, files, echo):
    model = echo()
    with response_file(files[1]):
        code, error = run(model, "--prompts", str(files[0]))
    assert code == 2
    assert "is being written by another process" in error
    assert model.backend.asked == []
    assert files[1].read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --prompts --self-prompt is required"),
        (["--prompts", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--prompts", "{file}", "--limit", "1", "--weights", "1", "2"], "--weights needs one"),
        (["--prompts", "{file}", "--limit", "1", "--weights", "0"], "one number above 0"),
        (["--prompts", "{file}", "--limit", "1", "--weights", "nan"], "one number above 0"),
        (["--prompts", "{file}", "--limit", "0"], "limit must be 1 or more"),
        (["--prompts", "{file}", "--weights", "1"], "--weights divide up the --limit"),
        (["--self-prompt", "2", "--limit", "1"], "--limit needs --prompts"),
        (["--self-prompt", "0"], "self-prompt must be 1 or more"),
        (["--prompts", "{file}", "--parallel", "0"], "parallel must be 1 or more"),
        (["--prompts", "{file}", "--temperature", "-1"], "temperature must be 0"),
        (["--prompts", "{file}", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["--self-prompt", "2", "--output", "."], "cannot be written"),
    ],
)
def test_invalid_input_is_a_one_line_error(arguments, message, files, capsys):
    arguments = [argument.format(file=files[0]) for argument in arguments]
    assert distill.main(["--output", str(files[1]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("parallel", [1, 3, 8])
def test_responses_are_those_of_plain_decoding(parallel, tmp_path):
    check_plain_decoding("reference", "llama", tmp_path, "--parallel", str(parallel))
