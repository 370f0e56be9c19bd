"""Invalid input to `python -m treeflash.generate`: a one-line error and exit status 2."""

from __future__ import annotations

import io
import sys

import pytest

from treeflash.errors import NumericalError

TEXT = "Some text."


def bad_files(folder):
    """Write the files that the command lines below name."""
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("\n")
    (folder / "rows.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    (folder / "bad.jsonl").write_text('{"id": 1, "prompt": "x"}\n{"id": \n')
    (folder / "other.jsonl").write_text('{"some": "thing"}\n{"else": 1}\n')


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--budget 0 hi", "budget must be auto, or from 1 to 1024 nodes, got 0"),
        ("--budget=-1 hi", "budget must be auto, or from 1 to 1024 nodes"),
        ("--budget 100000 hi", "budget must be auto, or from 1 to 1024 nodes, got 100000"),
        ("--budget many hi", "neither auto nor a number of nodes: many"),
        ("--temperature hot hi", "invalid float value"),
        ("--method magic hi", "invalid choice"),
        ("--nonsense hi", "unrecognized arguments"),
        ("one two", "unrecognized arguments"),
        ("hi --prompt-file x", "not allowed with"),
        ("--prompt-file missing.txt", "missing.txt cannot be read"),
        ("--prompt-file .", "cannot be read"),
        ("--prompt-file latin.txt", "not UTF-8"),
        ("--prompt-file empty.txt", "is empty"),
        ("--explain hi", "put the prompt before --explain"),
        ("--explain=0 hi", "not a number of iterations"),
        ("--chat-template-args {x} hi", "not JSON"),
        ("--chat-template-args [] hi", "not a JSON object"),
        ("--raw --system x hi", "raw"),
        ("--prompts rows.jsonl", "--output"),
        ("--output out.jsonl hi", "go together"),
        ("--prompts rows.jsonl --output out.jsonl --compare", "--compare is for a single prompt"),
        ("--prompts rows.jsonl --output out.jsonl --explain", "--explain is for a single prompt"),
        ("--prompts rows.jsonl --output out.jsonl --json", "--json is for a single prompt"),
        ("--prompts rows.jsonl --output no/out.jsonl", "no/out.jsonl cannot be written"),
        ("--prompts rows.jsonl --output .", ". cannot be written"),
        ("--prompts rows.jsonl --output rows.jsonl", "is the file of prompts"),
        ("--prompts rows.jsonl --output other.jsonl", "other.jsonl:1 was not written by"),
        ("--prompts bad.jsonl --output out.jsonl", "bad.jsonl:2"),
        ("--prompts missing.jsonl --output out.jsonl", "missing.jsonl cannot be read"),
        ("--prompts empty.txt --output out.jsonl", "has no prompts"),
    ],
)
def test_invalid_input_prints_one_line_and_exits_with_2(
    use, run, scripted, tmp_path, monkeypatch, args, message
):
    use(scripted(TEXT))
    bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args.split(" "))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert (tmp_path / "rows.jsonl").read_text() == '{"id": 1, "prompt": "x"}\n'


@pytest.mark.parametrize("prompt", ["", "x" * 500, "\udce9"])
def test_invalid_prompts_print_one_line(use, run, scripted, prompt):
    use(scripted(TEXT))
    code, out, err = run(prompt)
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NumericalError("not finite"), "not finite\n"),
        (RuntimeError("CUDA out of memory"), "out of memory; try shorter texts"),
    ],
)
def test_an_error_while_decoding_is_on_its_own_line(
    use, run, scripted, monkeypatch, error, message
):
    model = use(scripted(TEXT))
    verify = model.backend.verify

    def fail(*args):
        if model.backend.verified == 2:
            raise error
        return verify(*args)

    monkeypatch.setattr(model.backend, "verify", fail)
    code, out, err = run("hi", "--budget", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {message}")
    assert out.endswith("\n")
    assert len(out) > 1
    assert TEXT.startswith(out[:-1])


def test_a_method_that_the_drafter_lacks_is_rejected(use, run, scripted):
    use(scripted(TEXT, head=False))
    code, _, err = run("hi", "--method", "treeflash")
    assert (code, err.count("\n")) == (2, 1)
    assert "--method ddtree" in err


@pytest.mark.parametrize("content", [b"", b"   \n", b"caf\xe9"])
def test_empty_or_undecodable_piped_input(run, monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    code, _, err = run()
    assert (code, err.count("\n")) == (2, 1)
    assert "standard input is" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--backend", ""], "unknown backend ''"),
        (["--device", ""], "device must be the name of a device, such as cpu or cuda:1, got ''"),
        (["--device", "cuda"], "runs on cpu only"),
        (["--dtype", "float16"], "float32 only"),
        (["--target", "/no/where"], "is not a folder"),
        (["--target", ""], "no"),
        (["--drafter", "/no/where"], "is not a folder"),
    ],
)
def test_invalid_models_print_one_line(run, tiny_pair, args, message):
    target, drafter = map(str, tiny_pair)
    models = ["--backend", "reference", "--target", target, "--drafter", drafter]
    code, out, err = run("hi", *models, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
