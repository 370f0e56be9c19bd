"""The command line `python -m treeflash.generate`."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from treeflash import generate
from treeflash.cli.prompt_source import SAMPLE_PROMPT
from treeflash.generate import main

TEXT = "Es war einmal ein Bär 🐻, der schlief."
NAMES = {
    "text", "token_ids", "accepted_lengths", "block_efficiency", "tokens_per_s", "prefill_s",
    "decode_s", "method", "budget", "backend", "device", "dtype", "seed", "finish_reason",
}  # fmt: skip


def asked(model) -> str:
    """The last prompt of the model, without special tokens."""
    return model.tokenizer.decode(model.backend.prompts[-1])


def test_the_text_goes_to_stdout_and_one_summary_to_stderr(use, run, scripted):
    use(scripted(TEXT))
    code, out, err = run("hi", "--budget", "5")
    assert (code, out) == (0, TEXT + "\n")
    assert re.search(r"\d+ tokens after a prompt of \d+, [\d.]+ tokens/s, block efficiency", err)
    assert "method treeflash, budget 5, backend scripted on cpu, float32, seed 0" in err
    assert "finish reason: stop" in err
    assert "accepted length: iterations" in err
    assert re.search(r"time: prefill .* s, draft .* s, tree .* s, verify .* s, commit .* s", err)
    assert err.count("block efficiency") == 1


def test_stdout_has_only_the_json(use, run, scripted):
    use(scripted(TEXT))
    code, out, err = run("hi", "--json", "--explain")
    values = json.loads(out)
    assert code == 0
    assert set(values) == NAMES
    assert values["text"] == TEXT
    assert "iteration 1" in err


def test_compare_equal(use, run, scripted):
    use(scripted(TEXT))
    code, out, err = run("hi", "--json", "--compare")
    compare = json.loads(out)["compare"]
    assert code == 0
    assert (compare["equal"], compare["first_difference"]) == (True, None)
    assert compare["speedup"] > 0
    assert "compared with plain decoding: equal, speedup" in err
    assert "without prefill" in err


@pytest.mark.parametrize(
    ("dtype", "margin", "code"),
    [("float32", 1.0, 1), ("float32", 0.0, 1), ("bfloat16", 1.0, 1), ("float16", 0.03125, 1)],
)
def test_compare_unequal_exits_1_and_says_where_and_by_what_margin(
    use, run, scripted, dtype, margin, code
):
    model = use(scripted(TEXT, differ_at=6, margin=margin))
    model.backend.dtype = dtype
    exit_code, out, err = run("hi", "--json", "--compare")
    compare = json.loads(out)["compare"]
    assert exit_code == code
    assert (compare["equal"], compare["first_difference"]) == (False, 6)
    assert (compare["margin"], compare["near_tie"]) == (margin, False)
    assert "NOT EQUAL: the texts differ from new token 6 on" in err
    assert f"margin between the best two logits there is {margin:.3g}" in err
    assert ("--dtype float32" in err) == (dtype != "float32")


@pytest.mark.parametrize(
    ("dtype", "spacing"),
    [("bfloat16", 4 / 128), ("float16", 4 / 1024)],
    ids=["bfloat16", "float16"],
)
def test_compare_unequal_at_a_near_tie_of_half_precision_exits_0(
    use, run, scripted, dtype, spacing
):
    model = use(scripted(TEXT, differ_at=6, margin=spacing))
    model.backend.dtype = dtype
    code, out, err = run("hi", "--json", "--compare")
    compare = json.loads(out)["compare"]
    assert code == 0
    assert (compare["equal"], compare["first_difference"]) == (False, 6)
    assert (compare["margin"], compare["spacing"], compare["near_tie"]) == (spacing, spacing, True)
    assert "differ from new token 6 on, at a near-tie" in err
    assert "NOT EQUAL" not in err


def test_compare_of_a_single_token_has_no_speedup(use, run, scripted):
    use(scripted(TEXT))
    code, out, _ = run("hi", "--json", "--compare", "--max-tokens", "1")
    assert code == 0
    assert json.loads(out)["compare"] == {
        "equal": True,
        "first_difference": None,
        "speedup": None,
    }


@pytest.mark.parametrize(("flags", "drawn"), [([], 0), (["--explain"], 3), (["--explain=1"], 1)])
def test_explain_draws_the_first_iterations(use, run, scripted, flags, drawn):
    use(scripted(TEXT))
    code, out, err = run("hi", *flags)
    assert (code, out) == (0, TEXT + "\n")
    assert len(re.findall(r"^iteration \d", err, re.MULTILINE)) == drawn
    assert ("bonus: the target's own choice" in err) == (drawn > 0)


def test_interrupted_text_summary_and_json_are_still_printed(use, run, scripted):
    use(scripted(TEXT, interrupt_at=3))
    code, out, err = run("hi", "--method", "ar")
    assert (code, out) == (130, TEXT[:3] + "\n")
    assert "finish reason: interrupted" in err
    use(scripted(TEXT, interrupt_at=3))
    code, out, _ = run("hi", "--method", "ar", "--json")
    values = json.loads(out)
    assert (code, values["finish_reason"], values["text"]) == (130, "interrupted", TEXT[:3])


def test_interrupted_while_comparing_keeps_the_text(use, run, scripted):
    model = use(scripted(TEXT))
    run("hi", "--compare")
    use(scripted(TEXT, interrupt_at=model.backend.verified))  # the plain run comes last
    code, out, err = run("hi", "--compare", "--json")
    values = json.loads(out)
    assert (code, values["text"], values["finish_reason"]) == (130, TEXT, "stop")
    assert "compare" not in values
    assert "not compared" in err


def test_prompt_from_a_file_loses_its_last_newline(use, run, scripted, tmp_path):
    model = use(scripted(TEXT))
    (tmp_path / "p.txt").write_text("first\nsecond\n", encoding="utf-8")
    assert run("--prompt-file", str(tmp_path / "p.txt"), "--raw")[0] == 0
    assert asked(model) == "first\nsecond"


def test_a_byte_order_mark_does_not_reach_the_model(use, run, scripted, tmp_path, monkeypatch):
    model = use(scripted(TEXT))
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbffirst\n")
    assert run("--prompt-file", str(tmp_path / "p.txt"), "--raw")[0] == 0
    assert asked(model) == "first"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufefffirst\n"))
    assert run("--raw")[0] == 0
    assert asked(model) == "first"


def test_prompt_from_standard_input(use, run, scripted, monkeypatch):
    model = use(scripted(TEXT))
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped\n"))
    assert run("--raw")[0] == 0
    assert asked(model) == "piped"


@pytest.mark.parametrize("closed", [False, True])
def test_the_default_prompt_is_a_sample(use, run, scripted, monkeypatch, closed):
    model = use(scripted(TEXT))
    with Path(os.devnull).open() as null:
        monkeypatch.setattr(sys, "stdin", None if closed else null)
        code, out, err = run("--raw")
    assert (code, out) == (0, TEXT + "\n")
    assert SAMPLE_PROMPT in err
    assert asked(model) == SAMPLE_PROMPT


def test_options_reach_the_decoder(use, run, scripted):
    model = use(scripted(TEXT))
    thinking = '{"enable_thinking": true}'
    code, out, err = run(
        "hi", "--system", "Be.", "--stop", "Bär", "--stop", "zz", "--chat-template-args", thinking
    )
    assert (code, out) == (0, "Es war einmal ein \n")
    assert asked(model) == "system: Be.user: hiassistant: <think>"
    assert "note: thinking is on" in err
    assert "note: thinking is on" not in run("hi")[2]


def test_the_system_message_of_a_drafters_training_is_pointed_out(use, run, scripted):
    use(scripted(TEXT))
    drafter = ("--drafter", "deepseek-ai/dspark_qwen3_4b_block7")
    note = "note: the drafter was trained with the system message 'You are a helpful assistant.'"
    assert note in run("hi", *drafter)[2]
    assert note not in run("hi", *drafter, "--system", "Be.")[2]
    assert note not in run("hi", *drafter, "--method", "ar")[2]


def test_a_text_may_not_fit_the_encoding_of_stdout(use, scripted, monkeypatch):
    use(scripted(TEXT))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["hi"]) == 0
    assert raw.getvalue().decode("ascii").strip() == TEXT.encode("ascii", "replace").decode()


def model_options(tiny_pair) -> list[str]:
    """Choose the tiny pair, on the reference backend."""
    target, drafter = map(str, tiny_pair)
    return ["--backend", "reference", "--target", target, "--drafter", drafter]


def command_line(tiny_pair, *args: str) -> list[str]:
    """Decode with the tiny pair in a process of its own."""
    python = [sys.executable, "-W", "error::RuntimeWarning", "-m", generate.__name__]
    return [*python, *model_options(tiny_pair), *args]


def test_the_module_runs_without_a_warning(tiny_pair):
    result = subprocess.run(
        command_line(tiny_pair, "--json", "--compare", "--max-tokens", "12", "hi"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert json.loads(result.stdout)["compare"]["equal"] is True
    assert "Warning" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
def test_sigint_ends_a_process_with_its_summary(tiny_pair):
    process = subprocess.Popen(
        command_line(tiny_pair, "--method", "ar", "--max-tokens", "4000", "hi"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell lets its background jobs ignore it, and what they start as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"finish reason: interrupted" in err
    assert b"Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes differ on Windows")
def test_a_closed_pipe_is_not_an_error(tiny_pair):
    process = subprocess.Popen(
        command_line(tiny_pair, "--json", "--max-tokens", "2", "hi"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors differ on Windows")
@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_standard_stream_is_not_an_error(tiny_pair, closed):
    process = subprocess.run(
        command_line(tiny_pair, "--max-tokens", "2", "hi"),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.close(closed),
    )
    assert process.returncode == 0
    assert "Traceback" not in process.stderr
    assert (process.stdout == "") == (closed == 1)
    assert ("finish reason" in process.stderr) == (closed == 1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
def test_sigint_while_importing_has_no_traceback(tmp_path):
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "huggingface_hub.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-m", generate.__name__, "hi"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.returncode in (130, -signal.SIGINT)  # shells report both as 130
    assert process.stderr == "interrupted\n"
