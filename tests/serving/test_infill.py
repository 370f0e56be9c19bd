"""Fill in the middle: what editors ask for, with the tokens that a tokenizer declares."""

from __future__ import annotations

import json
from itertools import product

import openai
import pytest
from bodies import ollama
from byte_tokens import byte_pair
from scripted_model import reference_model
from servers import MAX_POSITIONS, NAME, check_error, serving

from treeflash.errors import PromptError
from treeflash.text.infill import GAP_TOKENS, Infill, infill_of
from treeflash.text.tokenizer import Tokenizer

BEFORE, AFTER = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
FORMS = {
    "qwen": "<|fim_prefix|>BEFORE<|fim_suffix|>AFTER<|fim_middle|>",
    "starcoder": "<fim_prefix>BEFORE<fim_suffix>AFTER<fim_middle>",
    "santacoder": "<fim-prefix>BEFORE<fim-suffix>AFTER<fim-middle>",
    "codellama": "▁<PRE>BEFORE▁<SUF>AFTER▁<MID>",
    "deepseek": "<｜fim▁begin｜>BEFORE<｜fim▁hole｜>AFTER<｜fim▁end｜>",
    "codestral": "[SUFFIX]AFTER[PREFIX]BEFORE",
}
"""What each family's model cards say, in the order of `GAP_TOKENS`."""
TOKENS = dict(zip(FORMS, GAP_TOKENS, strict=True))
MORE = {"max_tokens": 24, "temperature": 1.0, "seed": 5}


def special_tokens(family):
    tokens = TOKENS[family]
    return [x for x in (tokens.before, tokens.after, tokens.middle, *tokens.ends) if x]


def write_family(folder, family):
    return byte_pair(folder, more=special_tokens(family), max_positions=MAX_POSITIONS)


def expected_ids(tokenizer, family):
    return tokenizer.encode(FORMS[family].replace("BEFORE", BEFORE).replace("AFTER", AFTER))


@pytest.fixture(scope="module", params=["qwen", "starcoder"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def coder(tmp_path_factory, family):
    return reference_model(*write_family(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def editor(coder):
    with serving(coder) as running:
        yield running


@pytest.mark.parametrize("family", FORMS)
def test_prompts_have_the_order_of_their_family(tmp_path, family):
    tokenizer = Tokenizer.from_folder(write_family(tmp_path, family)[0])
    infill = Infill.find(tokenizer)
    assert infill.encode(BEFORE, AFTER) == expected_ids(tokenizer, family)
    declared = tokenizer.transformers.convert_tokens_to_ids(special_tokens(family))
    assert infill.stop_token_ids == tokenizer.stop_token_ids | set(declared)
    with pytest.raises(PromptError, match="not valid Unicode"):
        infill.encode(BEFORE, "\ud800")


def test_a_tokenizer_without_such_tokens(folders):
    tokenizer = Tokenizer.from_folder(folders[0])
    assert Infill.find(tokenizer) is None
    with pytest.raises(PromptError, match="suffix needs a model whose tokenizer has tokens to"):
        infill_of(tokenizer)


@pytest.mark.sample(1)
def test_a_gap_is_filled_with_and_without_drafts(editor, coder, family):
    """Through both APIs, the text is plain decoding's."""
    plain = coder.generate(
        expected_ids(coder.tokenizer, family),
        method="ar",
        stop_token_ids=Infill.find(coder.tokenizer).stop_token_ids,
        **MORE,
    )
    assert plain.text
    for method, budget in (("ar", 1), ("treeflash", 8), ("suffix", 8), ("treeflash", "auto")):
        fields = {"suffix": AFTER, "method": method, "budget": budget, **MORE}
        answer = editor.complete(BEFORE, **fields).json()
        assert answer["choices"][0]["text"] == plain.text
        assert answer["usage"]["prompt_tokens"] == plain.prompt_tokens
    for raw, stream in product((False, True), repeat=2):
        options = {"num_predict": 24, "temperature": 1.0, "seed": 5}
        body = {"model": NAME, "prompt": BEFORE, "suffix": AFTER, "options": options, "raw": raw}
        response = editor.post("/api/generate", body | {"stream": stream})
        parts = [json.loads(line)["response"] for line in response.text.splitlines()]
        assert "".join(parts) == plain.text


def test_the_clients_of_editors(editor, coder, family):
    with openai.OpenAI(base_url=f"{editor.url}/v1", api_key="-", max_retries=0) as client:
        answer = client.completions.create(model=NAME, prompt=BEFORE, suffix=AFTER, **MORE)
    assert answer.usage.prompt_tokens == len(expected_ids(coder.tokenizer, family))
    shown = editor.post("/api/show", {"model": NAME}).json()
    assert "insert" in shown["capabilities"]


def test_the_next_file_ends_the_text_of_a_gap(editor, coder, family):
    """Unless the request ignores the ends."""
    (end,) = coder.tokenizer.transformers.convert_tokens_to_ids([TOKENS[family].ends[0]])
    fields = {"suffix": AFTER, "max_tokens": 4, "logit_bias": {str(end): 100}}
    (choice,) = editor.complete(BEFORE, **fields).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    (choice,) = editor.complete(BEFORE, ignore_eos=True, **fields).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_several_prompts(editor):
    several = editor.complete([BEFORE, "x = "], suffix=AFTER, **MORE).json()["choices"]
    for before, choice in zip([BEFORE, "x = "], several, strict=True):
        (alone,) = editor.complete(before, suffix=AFTER, **MORE).json()["choices"]
        assert choice["text"] == alone["text"]


def test_fields_that_a_gap_excludes(editor):
    for field in ({"system": "Be brief."}, {"format": "json"}, {"think": True}):
        response = editor.post(*ollama("generate", prompt=BEFORE, suffix=AFTER, **field))
        check_error(response, 400, "suffix has no template: remove system")
