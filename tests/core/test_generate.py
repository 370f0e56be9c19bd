"""The command line `treeflash generate`: output, and invalid input in one line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from failures import failing
from processes import core_command, core_module

from treeflash.cli.single_prompt import SAMPLE_PROMPT, summarise
from treeflash.commands.generate import main
from treeflash.errors import NumericalError

TEXT = "Es war einmal ein Bär 🐻, der schlief."
NAMES = {
    "target", "drafter", "text", "token_ids", "prompt_tokens", "accepted_lengths",
    "block_efficiency", "tokens_per_s", "prefill_s", "decode_s", "method", "budget", "backend",
    "device", "dtype", "inexact", "seed", "finish_reason", "paused_iterations",
}  # fmt: skip


def asked(model) -> str:
    """The last prompt of the model, without special tokens."""
    return model.tokenizer.decode(model.backend.prompts[-1])


def test_the_text_goes_to_stdout_and_one_summary_to_stderr(use, run, scripted):
    use(scripted(TEXT))
    code, out, err = run("hi", "--budget", "5")
    assert (code, out) == (0, TEXT + "\n")
    assert re.search(r"\d+ tokens after a prompt of \d+, [\d.]+ tokens/s, block efficiency", err)
    assert "method treeflash, budget 5, backend scripted on cpu, float32, seed 0, " in err
    assert "rounding may differ, finish reason: stop" in err
    assert "tokens gained per forward pass, and how often" in err
    assert re.search(r"time: prefill .* s, draft .* s, tree .* s, verify .* s, commit .* s", err)
    assert err.count("block efficiency") == 1


def test_a_summary_counts_captured_graphs(use, run, scripted):
    model = scripted(TEXT)
    use(model)
    assert "captured" not in run("hi")[2]
    model.backend.captures = 3
    assert "\n3 graphs captured or compiled, in the times above or before\n" in run("hi")[2]


def test_stdout_has_only_the_json(use, run, scripted):
    use(scripted(TEXT))
    code, out, err = run("hi", "--json", "--explain")
    values = json.loads(out)
    assert code == 0
    assert set(values) == NAMES
    assert values["text"] == TEXT
    assert "iteration 1" in err


def test_a_summary_says_where_drafting_was_paused(scripted):
    generation = scripted(TEXT).generate("hi")
    assert "paused" not in summarise(generation)
    paused = replace(generation, accepted_lengths=[1, 1, 3], paused_iterations=2)
    assert "drafting was paused in 2 of 3 iterations: drafts cost more" in summarise(paused)


@pytest.mark.parametrize("width", [40, 50, 80, 200])
def test_the_bars_of_a_summary_fit_into_the_terminal(scripted, width):
    generation = replace(scripted(TEXT).generate("hi"), accepted_lengths=[1] * 120 + [3] * 60)
    one, three = re.findall(" +[13]: █+ 1?[26]0", summarise(generation, width))
    assert len(one) == min(width, 61)
    assert abs(one.count("█") - 2 * three.count("█")) <= 1


def test_the_json_names_the_models(run, tiny_pair):
    code, out, _ = run("hi", *model_options(tiny_pair), "--json", "--max-tokens", "3")
    values = json.loads(out)
    assert code == 0
    assert (values["target"], values["drafter"]) == ("target", "drafter")
    assert values["prompt_tokens"] > 2


def test_penalties_biases_and_log_probs(run, tiny_pair):
    common = ["hi", *model_options(tiny_pair), "--json", "--max-tokens", "6"]
    plain = json.loads(run(*common)[1])
    forbidden = json.dumps({plain["token_ids"][0]: -100})
    options = ["--logit-bias", forbidden, "--repetition-penalty", "1.5", "--logprobs", "2"]
    options += ["--presence-penalty", "0.5", "--frequency-penalty", "0.5"]
    values = json.loads(run(*common, *options)[1])
    assert plain["token_ids"][0] not in values["token_ids"]
    assert len(values["token_ids"]) == len(set(values["token_ids"]))
    assert [len(token["top"]) for token in values["log_probs"]] == [2] * 6


def test_log_probs_are_listed_after_the_text(run, tiny_pair):
    options = [*model_options(tiny_pair), "--max-tokens", "2", "--logprobs", "1"]
    for n, lines in (([], 2), (["--n", "2"], 4)):
        _, _, err = run("hi", *options, *n)
        found = re.findall(r"^ +-\d+\.\d{3}  '.*'  \('.*' -\d+\.\d{3}\)$", err, re.MULTILINE)
        assert len(found) == lines


def test_n_answers_have_different_seeds(run, tiny_pair):
    options = [*model_options(tiny_pair), "--max-tokens", "8", "--temperature", "1", "--seed", "7"]
    code, out, _ = run("hi", *options, "--n", "3", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [answer["seed"] for answer in answers] == [7, 8, 9]
    assert len({answer["text"] for answer in answers}) == 3
    assert json.loads(run("hi", *options, "--json")[1])["text"] == answers[0]["text"]
    _, out, err = run("hi", *options, "--n", "2")
    assert "answer 2 of 2, seed 8:" in err
    assert answers[1]["text"].strip() in out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt, 130, "interrupted; 1 did not end; 1 answer, "),
        (NumericalError("not finite"), 2, "error: not finite\n"),
    ],
)
def test_an_early_end_keeps_the_answers_that_ended(use, run, scripted, error, code, line):
    def options(n):
        return "hi", "--n", str(n), "--parallel", "1", "--seed", "7", "--json"

    model = use(scripted(TEXT))
    run(*options(1))
    calls = model.backend.verified
    with failing(model.backend, "verify", error, call=calls + 1):
        found, out, err = run(*options(2))
    assert found == code
    (answer,) = map(json.loads, out.splitlines())
    assert (answer["text"], answer["seed"]) == (TEXT, 7)
    assert line in err


def test_the_seed_is_random_and_can_be_repeated(run, tiny_pair):
    options = ["hi", *model_options(tiny_pair), "--max-tokens", "8", "--temperature", "1", "--json"]
    first, second = (json.loads(run(*options)[1]) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = json.loads(run(*options, "--seed", str(first["seed"]))[1])
    assert again["token_ids"] == first["token_ids"]
    greedy = ["hi", *model_options(tiny_pair), "--max-tokens", "2", "--json"]
    assert json.loads(run(*greedy)[1])["seed"] == 0


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("option", "value", "pattern"),
    [
        ("--regex", "(red|blue)!", r"(red|blue)!"),
        ("--grammar", 'start: ("red" | "blue") "!"', r"(red|blue)!"),
        ("--grammar", 'root ::= ("red" | "blue") "!"', r"(red|blue)!"),
        ("--json-schema", '{"enum": ["red", "blue"]}', r'"(red|blue)"'),
    ],
)
def test_the_form_of_the_text(run, tiny_pair, tmp_path, option, value, pattern):
    pytest.importorskip("llguidance")
    options = ["hi", *model_options(tiny_pair), "--max-tokens", "20", "--temperature", "1"]
    code, _, err = run(*options, option, value)
    assert (code, err.count("\n")) == (2, 1)
    assert "needs a target with an end token" in err
    shutil.copytree(tiny_pair[0], tmp_path / "target")
    (tmp_path / "target" / "generation_config.json").write_text('{"eos_token_id": 2}')
    options += ["--target", str(tmp_path / "target")]
    code, out, err = run(*options, option, value)
    assert code == 0, err
    assert re.fullmatch(pattern, out.strip())
    if option != "--regex":
        file = tmp_path / "form"
        file.write_text(value)
        _, out, _ = run(*options, option, f"@{file}", "--compare")
        assert re.fullmatch(pattern, out.strip())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (["--regex", "("], "invalid grammar"),
        (["--grammar", "start: ("], "invalid grammar"),
        (["--grammar", "root ::= ("], "invalid grammar"),
        (["--json-schema", '{"type": "nothing"}'], "invalid grammar"),
        # The model decides which special tokens there are.
        (["--grammar", 'start: <|its_own|> "a"'], "no such folder"),
    ],
)
def test_a_wrong_form_is_refused_before_the_model_is_loaded(run, form, message):
    pytest.importorskip("llguidance")
    code, out, err = run(*form, "--target", "./no such folder", "hi")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_dash_is_standard_input(use, run, scripted, stdin):
    model = use(scripted(TEXT))
    stdin("piped\n")
    assert run("-", "--raw")[0] == 0
    assert asked(model) == "piped"


@pytest.mark.parametrize("budget", ["auto", "5"])
def test_compare_equal(use, run, scripted, budget):
    use(scripted(TEXT))
    code, out, err = run("hi", "--json", "--compare", "--budget", budget)
    compare = json.loads(out)["compare"]
    assert code == 0
    assert (compare["equal"], compare["first_difference"]) == (True, None)
    assert compare["speedup"] > 0
    assert "compared with plain decoding: equal, speedup" in err
    assert "without the prefill" in err


def test_a_backend_prepares_its_passes_before_it_is_timed(use, run, scripted):
    backend, asked = use(scripted(TEXT)).backend, []
    backend.warm_up = lambda parallel: asked.append((parallel, backend.verified)) or 0
    run("hi")
    before = backend.verified
    run("hi", "--compare")
    assert asked == [(1, before)]


@pytest.mark.parametrize(
    ("dtype", "margin"),
    [("float32", 1.0), ("float32", 0.0), ("bfloat16", 1.0), ("float16", 0.03125)],
)
def test_compare_unequal_exits_1_and_says_where_and_by_what_margin(
    use, run, scripted, dtype, margin
):
    model = use(scripted(TEXT, differ_at=6, margin=margin))
    model.backend.dtype = dtype
    code, out, err = run("hi", "--json", "--compare")
    compare = json.loads(out)["compare"]
    assert code == 1
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
    assert json.loads(out)["compare"] == {"equal": True, "first_difference": None, "speedup": None}


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


def test_a_byte_order_mark_does_not_reach_the_model(use, run, scripted, tmp_path, stdin):
    model = use(scripted(TEXT))
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbffirst\n")
    assert run("--prompt-file", str(tmp_path / "p.txt"), "--raw")[0] == 0
    assert asked(model) == "first"
    stdin("\ufefffirst\n")
    assert run("--raw")[0] == 0
    assert asked(model) == "first"


def test_prompt_from_standard_input(use, run, scripted, stdin):
    model = use(scripted(TEXT))
    stdin("piped\n")
    assert run("--raw")[0] == 0
    assert asked(model) == "piped"


@pytest.mark.parametrize("closed", [False, True])
def test_the_default_prompt_is_a_sample(use, run, scripted, stdin, closed):
    model = use(scripted(TEXT))
    with Path(os.devnull).open() as null:
        stdin(None if closed else null)
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
    # The best drafter of this target was skipped.
    folder = Path("/hub/models--deepseek-ai--dspark_qwen3_4b_block7/snapshots/0a1b")
    use(replace(scripted(TEXT), drafter_folder=folder))
    assert note in run("hi", "--target", "Qwen/Qwen3-4B")[2]
    assert note not in run("hi", *drafter, "--method", "ar")[2]


def test_a_text_may_not_fit_the_encoding_of_stdout(use, scripted):
    use(scripted(TEXT))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(stdout):
        assert main(["hi"]) == 0
    written = stdout.buffer.getvalue().decode("ascii")
    assert written.strip() == TEXT.encode("ascii", "replace").decode()


def model_options(tiny_pair) -> list[str]:
    """Choose the tiny pair, on the reference backend."""
    target, drafter = map(str, tiny_pair)
    return ["--backend", "reference", "--target", target, "--drafter", drafter]


def command_line(tiny_pair, *args: str) -> list[str]:
    """Decode with the tiny pair in a separate process."""
    return core_command("generate", *model_options(tiny_pair), *args)


def test_the_module_runs_without_a_warning(tiny_pair):
    options = [*model_options(tiny_pair), "--json", "--compare", "--max-tokens", "12"]
    result = subprocess.run(
        core_module("treeflash.generate", *options, "hi"), capture_output=True, text=True
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
    _, err = process.communicate(timeout=300)
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
    assert process.wait(timeout=300) == 141
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


# A process each; `test_a_closed_pipe_is_not_an_error` has another way in which a stream ends.
@pytest.mark.nightly
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
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(600)\n"
    (tmp_path / "huggingface_hub.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-m", "treeflash.generate", "hi"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.returncode in (130, -signal.SIGINT)  # shells report both as 130
    assert process.stderr == "interrupted\n"


SHORT_TEXT = "Some text."


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
        ("--budget many hi", "must be auto or a number of nodes, got many"),
        ("--head-rows many hi", "must be full, auto or a number of tokens, got many"),
        ("--suffix maybe hi", "must be on or off, got maybe"),
        ("--suffix-cache-gb 1 hi", "--suffix-cache-gb needs --prompts; remove it for a single"),
        ("--suffix-cache-gb -1 hi", "'-1' is not a number of GiB, 0 or more"),
        ("--suffix-cache-gb x hi", "'x' is not a number of GiB, 0 or more"),
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
        ("--chat-template-args {x} hi", "invalid JSON"),
        ("--chat-template-args [] hi", "must be a JSON object"),
        ("--raw --system x hi", "raw"),
        ("--prompts rows.jsonl", "--output"),
        ("--logit-bias {x} hi", "invalid JSON"),
        ('--logit-bias {"x":1} hi', "must be numbers by token id"),
        (f'--logit-bias {{"1":1{"0" * 400}}} hi', "must be numbers by token id"),
        ('--logit-bias {"1":NaN} hi', "logit_bias must give one number per token id"),
        ("--json-schema [] hi", "must be a JSON object"),
        ("--json-schema @missing.json hi", "missing.json cannot be read"),
        ("--regex a --grammar b hi", "grammar and regex exclude each other"),
        ("--logprobs -1 hi", "log_probs must be 0 or more"),
        ("--n 0 hi", "n must be 1 or more, got 0"),
        ("--n 2 --compare hi", "--compare and --explain are for a single answer"),
        ("--prompts rows.jsonl --output out.jsonl --n 2", "--n is for a single prompt"),
        ("--output out.jsonl hi", "must be given together"),
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
    use(scripted(SHORT_TEXT))
    bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args.split(" "))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert (tmp_path / "rows.jsonl").read_text() == '{"id": 1, "prompt": "x"}\n'


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("arguments", [[" \n"], ["--n", "0", "hi"]])
def test_what_the_command_line_tells_is_refused_before_loading(run, arguments):
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("prompt", ["", " ", "x" * 500, "\udce9"])
def test_invalid_prompts_print_one_line(use, run, scripted, prompt):
    use(scripted(SHORT_TEXT))
    code, out, err = run(prompt)
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NumericalError("not finite"), "not finite\n"),
        (RuntimeError("CUDA out of memory"), "out of memory; try shorter texts"),
    ],
)
def test_an_error_while_decoding_is_on_its_own_line(use, run, scripted, error, message):
    model = use(scripted(SHORT_TEXT))
    verify = model.backend.verify

    def fail(*args):
        if model.backend.verified == 2:
            raise error
        return verify(*args)

    model.backend.verify = fail
    code, out, err = run("hi", "--budget", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {message}")
    assert out.endswith("\n")
    assert len(out) > 1
    assert SHORT_TEXT.startswith(out[:-1])
    with failing(model.backend, "extend", error):
        code, out, err = run("hi")
    assert (code, out, err.startswith(f"error: {message}")) == (2, "", True)


def test_a_method_that_the_drafter_lacks_is_rejected(use, run, scripted):
    use(scripted(SHORT_TEXT, head=False))
    code, _, err = run("hi", "--method", "treeflash")
    assert (code, err.count("\n")) == (2, 1)
    assert "use method ddtree" in err


@pytest.mark.parametrize("content", [b"", b"   \n", b"caf\xe9"])
def test_empty_or_undecodable_piped_input(run, stdin, content):
    stdin(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    code, _, err = run()
    assert (code, err.count("\n")) == (2, 1)
    assert "standard input is" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--backend", ""], "unknown backend ''"),
        (["--device", ""], "device must be the name of a device, such as cpu or cuda:1, got ''"),
        (["--device", "cuda"], "device must be cpu"),
        (["--dtype", "float16"], "dtype must be float32"),
        (["--target", "/no/where"], "is not a folder"),
        (["--target", ""], "'' is not a folder"),
        (["--drafter", "/no/where"], "is not a folder"),
    ],
)
def test_invalid_models_print_one_line(run, tiny_pair, args, message):
    target, drafter = map(str, tiny_pair)
    models = ["--backend", "reference", "--target", target, "--drafter", drafter]
    code, out, err = run("hi", *models, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
