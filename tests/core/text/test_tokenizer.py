"""Tokenizer and chat templates, on tiny tokenizers built here."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tiny_tokenizers import (
    CHAT_TEMPLATE,
    THINKING_TEMPLATE,
    byte_level,
    save_folder,
)

from treeflash.errors import CheckpointError, PromptError
from treeflash.text.tokenizer import Tokenizer


def test_special_tokens_are_left_out_but_can_be_shown(plain: Tokenizer):
    start = plain.encode("<|start|>")
    assert len(start) == 1
    assert plain.decode([*start, *plain.encode("a")]) == "a"
    assert plain.token_text(start[0]) == "<|start|>"
    assert plain.token_text(plain.encode("a")[0]) == "a"
    assert "\ufffd" not in plain.token_text(plain.encode("👋")[0])
    assert plain.token_text(100_000) == "<100000>"


def test_spaces_before_punctuation_stay(plain: Tokenizer):
    assert plain.decode(plain.encode("a , b . n't")) == "a , b . n't"


def test_chat_needs_a_template(plain: Tokenizer):
    assert not plain.has_chat_template
    with pytest.raises(PromptError, match="--raw"):
        plain.chat([{"role": "user", "content": "hi"}])


def test_chat_ends_in_the_generation_prompt(tmp_path: Path):
    folder = save_folder(tmp_path, byte_level(), chat_template=CHAT_TEMPLATE)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.has_chat_template
    assert not tokenizer.knows_thinking
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == tokenizer.encode(
        "<|start|>user: hi<|end|><|start|>assistant"
    )


def test_thinking_is_off_unless_asked_for(tmp_path: Path):
    folder = save_folder(tmp_path, byte_level(), chat_template=THINKING_TEMPLATE)
    tokenizer = Tokenizer.from_folder(folder)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.knows_thinking
    assert "<think>" not in tokenizer.decode(tokenizer.chat(messages))
    assert "<think>" in tokenizer.decode(tokenizer.chat(messages, {"enable_thinking": True}))


def test_thinking_may_be_on_by_default(tmp_path: Path):
    folder = save_folder(tmp_path, byte_level(), chat_template=THINKING_TEMPLATE)
    tokenizer = Tokenizer.from_folder(folder, thinking=True)
    messages = [{"role": "user", "content": "hi"}]
    assert "<think>" in tokenizer.decode(tokenizer.chat(messages))
    assert "<think>" not in tokenizer.decode(tokenizer.chat(messages, {"enable_thinking": False}))


def test_settings_of_the_tokenizer_are_no_template_variables(tmp_path: Path):
    folder = save_folder(tmp_path, byte_level(), chat_template=THINKING_TEMPLATE)
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(PromptError, match="'return_tensors' is reserved"):
        tokenizer.chat([{"role": "user", "content": "hi"}], {"return_tensors": "pt"})


@pytest.mark.parametrize(
    ("template", "template_args"),
    [
        ("{{ raise_exception('no system role') }}", {}),
        ("{{ messages[0].content.absent.absent }}", {}),
        ("{% if %}", {}),
        (CHAT_TEMPLATE, {"tokenize": False}),
    ],
)
def test_template_errors_are_one_line(tmp_path: Path, template: str, template_args: dict):
    tokenizer = Tokenizer.from_folder(save_folder(tmp_path, byte_level(), chat_template=template))
    with pytest.raises(PromptError, match=r"chat.template") as caught:
        tokenizer.chat([{"role": "user", "content": "hi"}], template_args)
    assert "\n" not in str(caught.value)


def test_stop_tokens_of_all_three_sources(tmp_path: Path):
    raw = byte_level()
    folder = save_folder(tmp_path, raw)
    end = raw.token_to_id("<|end|>")
    assert Tokenizer.from_folder(folder).stop_token_ids == {end}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 9}')
    assert Tokenizer.from_folder(folder).stop_token_ids == {end, 7, 8, 9}
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="generation_config"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("damage", [None, "", '{"version": "1.0", "mod', '{"model": {}}'])
def test_missing_or_damaged_tokenizer(tmp_path: Path, damage: str | None):
    folder = save_folder(tmp_path, byte_level())
    (folder / "tokenizer.json").unlink()
    if damage is not None:
        (folder / "tokenizer.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"no usable tokenizer") as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config\.json is not JSON"),
        ("[]", r"config\.json is not a JSON object"),
        ('{"model_type": "llama", "hidden_size": "x"}', r"config\.json is not usable.*hidden_size"),
        ('{"eos_token_id": "x"}', r"config\.json: eos_token_id must be a token id"),
        ('{"eos_token_id": [[1]]}', r"config\.json: eos_token_id must be a token id"),
    ],
)
def test_a_broken_configuration_is_not_taken_for_a_broken_tokenizer(
    tmp_path: Path, config: str, message: str
):
    folder = save_folder(tmp_path, byte_level())
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert "tokenizer.json" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_prompt_leaks_no_warning_of_transformers(tmp_path: Path, monkeypatch):
    folder = save_folder(tmp_path, byte_level(), chat_template=CHAT_TEMPLATE, model_max_length=16)
    tokenizer = Tokenizer.from_folder(folder)
    logger = logging.getLogger("transformers")
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    logger.addHandler(handler)
    try:
        token_ids = tokenizer.chat([{"role": "user", "content": "word " * 100}])
    finally:
        logger.removeHandler(handler)
    assert len(token_ids) > 100
    assert [record.getMessage() for record in said] == []
