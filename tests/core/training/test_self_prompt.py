"""Prompts that the target generates itself."""

import json

import pytest
from rich.console import Console

from treeflash.errors import ConfigError, PromptError
from treeflash.text.output_file import OutputFile
from treeflash.training.distillation import self_prompts


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def generate(path):
    def generate(count, model, seed=0):
        return self_prompts(model, count, path, Console(quiet=True), parallel=1, seed=seed)

    return generate


def test_an_interrupted_run_resumes(generate, path, echo, byte_tokenizer):
    with pytest.raises(KeyboardInterrupt):
        generate(4, echo(interrupt_at=1))
    assert len(path.read_text().splitlines()) == 1
    with path.open("a") as file:
        file.write('{"id": "self')  # torn in the middle of a line
    model = echo()
    assert {row.id for row in generate(4, model)} == {f"self-{n}" for n in range(4)}
    assert len(model.backend.asked) == 3
    header = byte_tokenizer.encode("<|start|>user: ")
    assert all(request.prompt_ids == header for request in model.backend.asked)
    seeds = {request.sampling.seed for request in model.backend.asked}
    kept = {json.loads(line)["seed"] for line in path.read_text().splitlines()}
    assert len(seeds) == 3
    assert kept == {0, 1, 2, 3}
    assert len(generate(2, echo(interrupt_at=0))) == 2


def test_a_target_that_writes_no_prompt_is_an_error(generate, scripted, monkeypatch):
    model = scripted("", " ", drafter=False)
    with pytest.raises(ConfigError, match="only empty prompts; use --prompts instead"):
        generate(2, model)
    monkeypatch.setattr(model.tokenizer.transformers, "chat_template", None)
    with pytest.raises(PromptError, match="has no chat template; use --prompts instead"):
        generate(2, model)


@pytest.mark.parametrize(
    ("name", "attributes", "seed"),
    [
        ("target", {"target": "other"}, 0),
        ("backend", {"backend": "other"}, 0),
        ("dtype", {"dtype": "bfloat16"}, 0),
        ("seed", {}, 1),
    ],
)
def test_prompts_of_other_settings_are_refused(name, attributes, seed, generate, path, echo):
    generate(2, echo())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"has lines generated with {name} "):
        generate(3, echo(**attributes), seed)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ['{"text": "mine"}\n', "notes", '{"id": "self-1", "prompt": "of nobody"}\n']
)
def test_a_file_of_another_program_is_refused(content, generate, path, echo):
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:1 was not written by a run like this"):
        generate(1, echo())
    assert path.read_text() == content


def test_a_file_that_another_process_writes_is_refused(generate, path, echo):
    with (
        OutputFile(path, bool),
        pytest.raises(ConfigError, match="being written by another process"),
    ):
        generate(1, echo())
    assert path.read_bytes() == b""
