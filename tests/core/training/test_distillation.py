"""Answers into a file: what is asked, what is kept, and what an interruption leaves."""

import json

import pytest
from rich.console import Console

from treeflash import distill
from treeflash.errors import ConfigError, PromptError
from treeflash.testing.tokenizer import END
from treeflash.text.prompt_file import Row
from treeflash.training.distillation import Distillation, DistillConfig, mix
from treeflash.training.self_prompt import self_prompts


class EchoResponder:
    """Answers with the prompt's last tokens; interrupts before the answer of that number."""

    max_positions = 400

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.asked = []

    def respond(self, requests, stop_token_ids, slots):
        assert END in stop_token_ids
        for index in reversed(range(len(requests))):
            if len(self.asked) == self.interrupt_at:
                raise KeyboardInterrupt
            self.asked.append(requests[index])
            yield index, [*requests[index].prompt_ids[-2:], END]


def rows(*turns):
    return [
        Row(id=f"r{n}", turns=tuple(({"role": "user", "content": text},) for text in texts))
        for n, texts in enumerate(turns)
    ]


def run(distillation, responder, tokenizer, **settings):
    distillation.run(responder, tokenizer, DistillConfig(**settings), Console(quiet=True))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_answered(tmp_path, byte_tokenizer):
    output, responder = tmp_path / "out.jsonl", EchoResponder()
    run(Distillation.resume(rows(["ab"], ["cd"]), output), responder, byte_tokenizer)
    records = {record["id"]: record for record in lines(output)}
    assert records.keys() == {"r0", "r1"}
    prompt = byte_tokenizer.chat([{"role": "user", "content": "ab"}])
    assert records["r0"] == {
        "id": "r0",
        "turn": 0,
        "temperature": 0.0,
        "prompt_ids": prompt,
        "response_ids": [*prompt[-2:], END],
    }


def test_later_turns_see_the_answers_before_them(tmp_path, byte_tokenizer):
    output, responder = tmp_path / "out.jsonl", EchoResponder()
    run(Distillation.resume(rows(["a", "b"]), output), responder, byte_tokenizer)
    first, second = lines(output)
    answer = byte_tokenizer.decode(first["response_ids"])
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "b"},
    ]
    assert second["turn"] == 1
    assert second["prompt_ids"] == byte_tokenizer.chat(messages)


def test_temperatures_take_turns_and_seeds_differ(tmp_path, byte_tokenizer):
    responder = EchoResponder()
    run(
        Distillation.resume(rows(["a"], ["b"], ["c"]), tmp_path / "out.jsonl"),
        responder,
        byte_tokenizer,
        temperatures=(0.0, 0.8),
        seed=5,
    )
    sampling = [request.sampling for request in reversed(responder.asked)]
    assert [s.temperature for s in sampling] == [0.0, 0.8, 0.0]
    assert [s.seed for s in sampling] == [5, 6, 7]


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, byte_tokenizer):
    asked = rows(["a", "b"], ["c"], ["d", "e"])
    run(Distillation.resume(asked, tmp_path / "whole"), EchoResponder(), byte_tokenizer)
    for stop in range(5):
        output = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(Distillation.resume(asked, output), EchoResponder(stop), byte_tokenizer)
        assert len(lines(output)) == stop
        with output.open("a") as file:
            file.write('{"id": "r0", "tu')  # torn in the middle of a line
        again = EchoResponder()
        run(Distillation.resume(asked, output), again, byte_tokenizer)
        assert len(again.asked) == 5 - stop
        key = lambda record: (record["id"], record["turn"])  # noqa: E731
        assert sorted(lines(output), key=key) == sorted(lines(tmp_path / "whole"), key=key)


def test_long_prompts_are_left_out(tmp_path, byte_tokenizer):
    distillation = Distillation.resume(rows(["a"], ["b" * 90]), tmp_path / "out.jsonl")
    responder = EchoResponder()
    run(distillation, responder, byte_tokenizer, max_prompt_tokens=80)
    assert len(responder.asked) == 1
    assert "1 of 2 prompts answered, 3 tokens" in distillation.report()


def test_answers_fit_the_target(tmp_path, byte_tokenizer):
    responder = EchoResponder()
    run(Distillation.resume(rows(["a"]), tmp_path / "o"), responder, byte_tokenizer, max_tokens=999)
    (request,) = responder.asked
    assert len(request.prompt_ids) + request.max_tokens == EchoResponder.max_positions


def test_a_file_of_another_program_is_refused(tmp_path, byte_tokenizer):
    (tmp_path / "out").write_text('{"text": "mine"}\n')
    for content in (
        '{"text": "mine"}\n',
        "notes without a newline",
        '{"id":1,"prompt":"a prompt without a newline"}',
    ):
        (tmp_path / "out").write_text(content)
        with pytest.raises(ConfigError, match="out:1 was not written by a run like this"):
            Distillation.resume([], tmp_path / "out")
        with pytest.raises(ConfigError, match="out:1 was not written by a run like this"):
            write_prompts(1, EchoResponder(), byte_tokenizer, tmp_path / "out")
        assert (tmp_path / "out").read_text() == content


@pytest.mark.parametrize(("text", "temperature"), [("a", 0.8), ("another", 0.0)])
def test_other_settings_do_not_go_into_the_same_file(text, temperature, tmp_path, byte_tokenizer):
    run(Distillation.resume(rows(["a"]), tmp_path / "out"), EchoResponder(), byte_tokenizer)
    again = Distillation.resume(rows([text], ["b"]), tmp_path / "out")
    with pytest.raises(ConfigError, match="has an answer to 'r0' from another prompt, target"):
        run(again, EchoResponder(), byte_tokenizer, temperatures=(temperature,))
    assert len(lines(tmp_path / "out")) == 1


def test_a_row_that_the_template_refuses_is_named(tmp_path, byte_tokenizer, monkeypatch):
    def refuse(*args):
        raise PromptError("the chat template refuses these messages")

    monkeypatch.setattr(byte_tokenizer, "chat", refuse)
    with pytest.raises(PromptError, match="the row 'r0': the chat template refuses"):
        run(Distillation.resume(rows(["a"]), tmp_path / "out"), EchoResponder(), byte_tokenizer)


def test_weights_share_the_limit_out():
    files = [[Row(id=f"{name}{n}", turns=()) for n in range(1000)] for name in ("a", "b")]
    chosen = mix(files, [3.0, 1.0], 400, seed=0)
    share = sum(str(row.id).startswith("a") for row in chosen) / 400
    assert 0.68 < share < 0.82
    assert chosen == mix(files, [3.0, 1.0], 400, seed=0)
    assert chosen != mix(files, [3.0, 1.0], 400, seed=1)


def test_without_limit_every_row_comes_once():
    files = [[Row(id="a", turns=())], [Row(id="b", turns=()), Row(id="c", turns=())]]
    assert {row.id for row in mix(files, [9.0, 1.0], None, seed=0)} == {"a", "b", "c"}


def test_an_id_in_two_files_is_refused():
    with pytest.raises(PromptError, match="the id 'a' is in two files"):
        mix([[Row(id="a", turns=())], [Row(id="a", turns=())]], [1.0, 1.0], None, seed=0)


def write_prompts(count, responder, tokenizer, path):
    return self_prompts(responder, tokenizer, count, path, Console(quiet=True), slots=2, seed=0)


def test_the_target_writes_prompts_itself(tmp_path, byte_tokenizer):
    path = tmp_path / "prompts.jsonl"

    def ask(count, responder):
        return write_prompts(count, responder, byte_tokenizer, path)

    with pytest.raises(KeyboardInterrupt):
        ask(4, EchoResponder(interrupt_at=1))
    assert len(lines(path)) == 1
    with path.open("a") as file:
        file.write('{"id": "self')  # torn in the middle of a line
    responder = EchoResponder()
    assert {row.id for row in ask(4, responder)} == {f"self-{n}" for n in range(4)}
    assert len(responder.asked) == 3
    header = byte_tokenizer.encode("<|start|>user: ")
    assert {request.prompt_ids for request in responder.asked} == {tuple(header)}
    assert len({request.sampling.seed for request in responder.asked}) == 3
    assert len(ask(2, EchoResponder(interrupt_at=0))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --prompts --self-prompt is required"),
        (["--prompts", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--prompts", "{file}", "--limit", "1", "--weights", "1", "2"], "--weights needs one"),
        (["--prompts", "{file}", "--limit", "1", "--weights", "0"], "one number above 0"),
        (["--prompts", "{file}", "--limit", "1", "--weights", "nan"], "one number above 0"),
        (["--prompts", "{file}", "--limit", "0"], "limit must be 1 or more"),
        (["--prompts", "{file}", "--weights", "1"], "shares of --limit answers"),
        (["--self-prompt", "2", "--limit", "1"], "--limit is of --prompts"),
        (["--self-prompt", "0"], "self-prompt must be 1 or more"),
        (["--prompts", "{file}", "--slots", "0"], "slots must be 1 or more"),
        (["--prompts", "{file}", "--temperature", "-1"], "temperature must be 0"),
        (["--prompts", "{file}", "--backend", "reference"], "'reference' cannot train"),
        (["--prompts", "{file}", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["--self-prompt", "2", "--output", "."], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": 1, "prompt": "hi"}\n')
    arguments = [argument.format(file=file) for argument in arguments]
    assert distill.main(["--output", str(tmp_path / "out.jsonl"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
