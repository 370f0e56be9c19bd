"""Reading files of responses."""

import json

import pytest
from byte_tokens import END

from treeflash.errors import PromptError
from treeflash.training.distillation import Response, foreign_responses, read_responses


def write(tmp_path, *records):
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_token_ids_are_used_unchanged(tmp_path, byte_tokenizer):
    path = write(tmp_path, {"id": 1, "prompt_ids": [3, 4], "response_ids": [5], "more": "free"})
    (response,) = read_responses(path, byte_tokenizer)
    assert response == Response(prompt_ids=(3, 4), response_ids=(5,))
    assert response.token_ids == (3, 4, 5)
    assert len(response) == 3


def test_answers_of_another_model_are_warned_of(tmp_path, byte_tokenizer):
    ids = {"prompt_ids": [3], "response_ids": [5]}
    names = ("Qwen/Qwen3-4B", "mlx-community/Qwen3-4B-4bit", "a/other", "a/other")
    path = write(tmp_path, ids, *({**ids, "target": name} for name in names))
    responses = read_responses(path, byte_tokenizer)
    assert [response.truncate(1).target for response in responses] == [None, *names]
    (line,) = foreign_responses(responses, tmp_path / "Qwen3-4B")
    assert line.startswith("warning: 2 of 5 responses were written by a/other, not by the target ")
    assert foreign_responses(responses[:3], tmp_path / "Qwen3-4B") == []


def test_a_conversation_goes_through_the_chat_template(tmp_path, byte_tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (response,) = read_responses(write(tmp_path, {"messages": messages}), byte_tokenizer)
    assert list(response.prompt_ids) == byte_tokenizer.chat(messages[:1])
    assert list(response.response_ids[:-1]) == byte_tokenizer.encode("ho")
    assert response.response_ids[-1] in byte_tokenizer.stop_token_ids
    assert response.response_ids[-1] == END


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "needs 'messages', or 'prompt_ids' and 'response_ids'"),
        ({"prompt_ids": [1], "response_ids": []}, "as lists of token ids"),
        ({"prompt_ids": [1], "response_ids": [True]}, "as lists of token ids"),
        ({"prompt_ids": [1], "response_ids": ["a"]}, "as lists of token ids"),
        ({"prompt_ids": [-1], "response_ids": [2]}, "as lists of token ids"),
        ({"messages": "hi"}, "must be a non-empty list"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "non-empty message of the assistant"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "non-empty message"),
    ],
)
def test_an_invalid_line_is_named(record, message, tmp_path, byte_tokenizer):
    good = {"prompt_ids": [1], "response_ids": [2]}
    with pytest.raises(PromptError, match=r"responses\.jsonl:2: .*" + message):
        read_responses(write(tmp_path, good, record), byte_tokenizer)


def test_a_byte_order_mark_is_ignored(tmp_path, byte_tokenizer):
    path = write(tmp_path, {"prompt_ids": [1], "response_ids": [2]})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(read_responses(path, byte_tokenizer)) == 1


def test_an_empty_file_is_refused(tmp_path, byte_tokenizer):
    with pytest.raises(PromptError, match="has no responses"):
        read_responses(write(tmp_path), byte_tokenizer)


def test_truncation_keeps_the_prompt():
    response = Response(prompt_ids=(1, 2), response_ids=(3, 4, 5))
    assert response.truncate(4).response_ids == (3, 4)
    assert response.truncate(9) == response
    assert response.truncate(1).response_ids == ()
