"""Responses in a file: what is requested, what is kept, and what an interruption leaves."""

import json

import pytest
from byte_tokens import END
from failures import failing
from rich.console import Console

from treeflash.config import SamplingConfig
from treeflash.errors import ConfigError, PromptError
from treeflash.text.prompt import Row
from treeflash.training.distillation import Distillation, DistillConfig, response_file


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def distill(output):
    """Answer rows into the output file; returns the distillation."""

    def distill(rows, model, **settings):
        with response_file(output) as file:
            distillation = Distillation(model, DistillConfig(**settings), file, rows)
            distillation.run(Console(quiet=True))
        return distillation

    return distill


@pytest.mark.parametrize("temperature", [(), 0.5])
def test_temperatures_are_a_tuple_of_one_or_more(temperature):
    with pytest.raises(ConfigError, match="temperature must be a tuple of at least one"):
        DistillConfig(temperature=temperature)


def rows(*conversations):
    """A row for each list of user messages."""
    return [
        Row(id=f"r{n}", turns=tuple(({"role": "user", "content": text},) for text in texts))
        for n, texts in enumerate(conversations)
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_answered(distill, output, echo, byte_tokenizer):
    distill(rows(["ab"], ["cd"]), echo())
    records = {record["id"]: record for record in lines(output)}
    assert records.keys() == {"r0", "r1"}
    prompt = byte_tokenizer.chat([{"role": "user", "content": "ab"}])
    assert records["r0"] == {
        "id": "r0",
        "turn": 0,
        "target": "target",
        "adapter": None,
        "backend": "echo",
        "dtype": "float32",
        "top_p": 1.0,
        "max_tokens": 512,
        "temperature": 0.0,
        "seed": 0,
        "prompt_ids": prompt,
        "response_ids": [*prompt[-2:], END],
    }


def test_later_turns_follow_the_responses_before_them(distill, output, echo, byte_tokenizer):
    distill(rows(["a", "b"]), echo())
    first, second = lines(output)
    response = byte_tokenizer.decode(first["response_ids"])
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": response},
        {"role": "user", "content": "b"},
    ]
    assert second["turn"] == 1
    assert second["prompt_ids"] == byte_tokenizer.chat(messages)


def test_temperatures_alternate_and_every_row_has_its_own_seed(distill, echo):
    model = echo()
    distill(rows(["a"], ["b"], ["c"]), model, temperature=(0.0, 0.8), top_p=0.7, seed=5)
    assert [request.sampling for request in model.backend.asked] == [
        SamplingConfig(temperature=0.0, top_p=0.7, seed=5),
        SamplingConfig(temperature=0.8, top_p=0.7, seed=6),
        SamplingConfig(temperature=0.0, top_p=0.7, seed=7),
    ]


def test_an_interrupted_run_resumes(distill, output, echo):
    asked = rows(["a", "b"], ["c"], ["d", "e"])
    key = lambda record: (record["id"], record["turn"])  # noqa: E731
    distill(asked, echo())
    whole = sorted(lines(output), key=key)
    for stop in range(5):
        output.unlink()
        with pytest.raises(KeyboardInterrupt):
            distill(asked, echo(stop), parallel=1)
        assert len(lines(output)) == stop
        with output.open("a") as file:
            file.write('{"id": "r0", "tu')  # torn in the middle of a line
        model = echo()
        distill(asked, model)
        assert len(model.backend.asked) == 5 - stop
        assert sorted(lines(output), key=key) == whole


def test_longer_prompts_are_skipped_and_named(distill, output, echo, byte_tokenizer):
    limit = len(byte_tokenizer.chat([{"role": "user", "content": "b" * 20}]))
    asked = rows(["a"], ["b" * 20], ["c" * 21, "then"], ["d", "e" * 30])
    distillation = distill(asked, echo(), max_prompt_tokens=limit)
    answered = {(record["id"], record["turn"]) for record in lines(output)}
    assert answered == {("r0", 0), ("r1", 0), ("r3", 0)}
    report = distillation.report()
    assert "3 of 6 prompts answered, 9 tokens; skipped as too long: 2 ('r2', 'r3')" in report


def test_the_report_names_a_few_of_many_skipped_prompts(distill, echo):
    distillation = distill(rows(["a"], *[["b" * 90]] * 7), echo(), max_prompt_tokens=80)
    assert "too long: 7 ('r1', 'r2', 'r3', 'r4', 'r5', ...)" in distillation.report()


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (1, "all prompts are longer than --max-prompt-tokens 1; raise it"),
        (999, "all prompts are too long for the target, which has 400 positions"),
    ],
)
def test_it_is_an_error_if_all_prompts_are_too_long(limit, message, distill, echo):
    with pytest.raises(ConfigError, match=message):
        distill(rows(["a" * 400], ["b" * 400]), echo(), max_prompt_tokens=limit)


def test_responses_fit_the_target(distill, echo):
    model = echo()
    distill(rows(["a"]), model, max_tokens=999)
    (request,) = model.backend.asked
    assert len(request.prompt_ids) + request.max_tokens == model.backend.max_positions


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "mine"}\n',
        "notes without a newline",
        '{"id":1,"prompt":"a prompt without a newline"}',
        '{"id":1,"turn":0,"prompt_ids":[3],"response_ids":[4]}\n',
    ],
)
def test_a_file_of_another_program_is_refused(content, output):
    output.write_text(content)
    with pytest.raises(ConfigError, match=r"out\.jsonl:1 was not written by a run like this"):
        response_file(output).__enter__()
    assert output.read_text() == content


SETTINGS = {
    "target": ({"target": "other"}, {}),
    "backend": ({"backend": "other"}, {}),
    "dtype": ({"dtype": "bfloat16"}, {}),
    "top_p": ({}, {"top_p": 0.9}),
    "max_tokens": ({}, {"max_tokens": 9}),
    "temperature": ({}, {"temperature": (0.8,)}),
    "seed": ({}, {"seed": 1}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_do_not_go_into_the_same_file(name, distill, output, echo):
    distill(rows(["a"]), echo())
    before = output.read_bytes()
    attributes, settings = SETTINGS[name]
    model = echo(**attributes)
    with pytest.raises(ConfigError, match=f"has lines generated with {name} .*, not .*--output"):
        distill(rows(["a"], ["b"]), model, **settings)
    assert model.backend.asked == []
    assert output.read_bytes() == before


def test_a_changed_prompt_does_not_count_as_answered(distill, echo):
    distill(rows(["a"]), echo())
    with pytest.raises(ConfigError, match="has a response to another prompt of the id 'r0'"):
        distill(rows(["changed"]), echo())


def test_a_row_that_the_template_rejects_is_named(distill, echo, byte_tokenizer):
    refused = PromptError("the chat template refuses these messages")
    with (
        failing(byte_tokenizer, "chat", refused),
        pytest.raises(PromptError, match="the row 'r0': the chat template refuses"),
    ):
        distill(rows(["a"]), echo())
