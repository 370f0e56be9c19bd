"""The command line `treeflash generate`: output, and invalid input in one line."""

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


@pytest.mark.parametrize("options", [[], ["--n", "2"], ["--explain"]])
def test_a_text_is_complete_if_nobody_reads_the_notes(use, run, scripted, options):
    use(scripted(TEXT))
    with failing(sys.stderr, "write", BrokenPipeError):
        code, out, _ = run("hi", *options)
    assert code == 0
    assert out == run("hi", *options)[1]


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


def test_the_json_names_the_models(run, pair_options):
    code, out, _ = run("hi", *pair_options, "--json", "--max-tokens", "3")
    values = json.loads(out)
    assert code == 0
    assert (values["target"], values["drafter"]) == ("target", "drafter")
    assert values["prompt_tokens"] > 2


def test_penalties_biases_and_log_probs(run, pair_options):
    common = ["hi", *pair_options, "--json", "--max-tokens", "6"]
    plain = json.loads(run(*common)[1])
    forbidden = json.dumps({plain["token_ids"][0]: -100})
    options = ["--logit-bias", forbidden, "--repetition-penalty", "1.5", "--logprobs", "2"]
    options += ["--presence-penalty", "0.5", "--frequency-penalty", "0.5"]
    values = json.loads(run(*common, *options)[1])
    assert plain["token_ids"][0] not in values["token_ids"]
    assert len(values["token_ids"]) == len(set(values["token_ids"]))
    assert [len(token["top"]) for token in values["log_probs"]] == [2] * 6


def test_log_probs_are_listed_after_the_text(run, pair_options):
    options = [*pair_options, "--max-tokens", "2", "--logprobs", "1"]
    for n, lines in (([], 2), (["--n", "2"], 4)):
        _, _, err = run("hi", *options, *n)
        found = re.findall(r"^ +-\d+\.\d{3}  '.*'  \('.*' -\d+\.\d{3}\)$", err, re.MULTILINE)
        assert len(found) == lines


def test_n_answers_have_different_seeds(run, pair_options):
    options = [*pair_options, "--max-tokens", "8", "--temperature", "1", "--seed", "7"]
    code, out, _ = run("hi", *options, "--n", "3", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [answer["seed"] for answer in answers] == [7, 8, 9]
    assert len({answer["text"] for answer in answers}) == 3
    assert json.loads(run("hi", *options, "--json")[1])["text"] == answers[0]["text"]
    _, out, err = run("hi", *options, "--n", "2")
    assert re.search("^answers .* 2/2 ", err, re.MULTILINE), "the progress"
    assert "answer 2 of 2, seed 8:" in err
    assert answers[1]["text"].strip() in out
    _, _, err = run("hi", *options[:-1], str(2**64 - 1), "--n", "2")
    assert re.findall("answer .*:", err) == [
        f"answer 1 of 2, seed {2**64 - 1}:",
        "answer 2 of 2, seed 0:",
    ]


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


def test_the_seed_is_random_and_can_be_repeated(run, pair_options):
    options = ["hi", *pair_options, "--max-tokens", "8", "--temperature", "1", "--json"]
    first, second = (json.loads(run(*options)[1]) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = json.loads(run(*options, "--seed", str(first["seed"]))[1])
    assert again["token_ids"] == first["token_ids"]
    greedy = ["hi", *pair_options, "--max-tokens", "2", "--json"]
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
def test_the_form_of_the_text(run, tiny_pair, tmp_path, option, value, pattern, pair_options):
    pytest.importorskip("llguidance")
    options = ["hi", *pair_options, "--max-tokens", "20", "--temperature", "1"]
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


PIPED = b"\xef\xbb\xbfpiped\n"


@pytest.mark.parametrize(
    ("arguments", "piped", "prompt"),
    [
        (["-"], "piped\n", "piped"),
        ([], "piped\n", "piped"),
        ([], PIPED.decode(), "piped"),  # the byte order mark does not reach the model
        (["--prompt-file", "lines.txt"], None, "first\nsecond"),
        (["--prompt-file", "mark.txt"], None, "piped"),
    ],
)
def test_where_a_prompt_comes_from(
    use, run, scripted, stdin, tmp_path, monkeypatch, arguments, piped, prompt
):
    model = use(scripted(TEXT))
    (tmp_path / "lines.txt").write_text("first\nsecond\n", encoding="utf-8")
    (tmp_path / "mark.txt").write_bytes(PIPED)
    monkeypatch.chdir(tmp_path)
    stdin(piped)
    assert run(*arguments, "--raw")[0] == 0
    assert asked(model) == prompt


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
    ("dtype", "margin", "near_tie"),
    [
        ("float32", 1.0, False),
        ("float32", 0.0, False),
        ("bfloat16", 1.0, False),
        ("float16", 0.03125, False),
        ("bfloat16", 4 / 128, True),  # the spacing of numbers of half precision there
        ("float16", 4 / 1024, True),
    ],
)
def test_compare_unequal_exits_1_unless_at_a_near_tie_and_says_where(
    use, run, scripted, dtype, margin, near_tie
):
    model = use(scripted(TEXT, differ_at=6, margin=margin))
    model.backend.dtype = dtype
    code, out, err = run("hi", "--json", "--compare")
    compare = json.loads(out)["compare"]
    assert code == (not near_tie)
    assert (compare["equal"], compare["first_difference"]) == (False, 6)
    assert (compare["margin"], compare["near_tie"]) == (margin, near_tie)
    assert ("NOT EQUAL" in err) != near_tie
    if near_tie:
        assert compare["spacing"] == margin
        assert "differ from new token 6 on, at a near-tie" in err
    else:
        assert "NOT EQUAL: the texts differ from new token 6 on" in err
        assert f"margin between the best two logits there is {margin:.3g}" in err
        assert ("--dtype float32" in err) == (dtype != "float32")


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


def command_line(pair_options, *args: str) -> list[str]:
    """Decode with the tiny pair in a separate process."""
    return core_command("generate", *pair_options, *args)


def test_the_module_runs_without_a_warning(pair_options):
    options = [*pair_options, "--json", "--compare", "--max-tokens", "12"]
    result = subprocess.run(
        core_module("treeflash.generate", *options, "hi"), capture_output=True, text=True
    )
    assert result.returncode == 0
    assert json.loads(result.stdout)["compare"]["equal"] is True
    assert "Warning" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
def test_sigint_ends_a_process_with_its_summary(pair_options):
    process = subprocess.Popen(
        command_line(pair_options, "--method", "ar", "--max-tokens", "4000", "hi"),
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
def test_a_closed_pipe_is_not_an_error(pair_options):
    process = subprocess.Popen(
        command_line(pair_options, "--json", "--max-tokens", "2", "hi"),
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
def test_a_closed_standard_stream_is_not_an_error(pair_options, closed):
    process = subprocess.run(
        command_line(pair_options, "--max-tokens", "2", "hi"),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.close(closed),
    )
    assert process.returncode == 0
    assert "Traceback" not in process.stderr
    assert (process.stdout == "") == (closed == 1)
    assert ("finish reason" in process.stderr) == (closed == 1)


SHORT_TEXT = "Some text."


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
