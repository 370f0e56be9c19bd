"""Prompts with images: the parts of messages, where they are allowed, and what the target gets."""

import asyncio
import json
from copy import deepcopy

import pytest

pytest.importorskip("PIL")
from scripted_model import reference_model
from stub_images import FEATURES, StubProcessor, picture, url_of

from treeflash.errors import PromptError
from treeflash.text.prompt import encode, encode_chat, find_images, image_part, read_rows, text_part
from treeflash.text.tokenizer import Tokenizer

ONE, TWO = picture(1), picture(2)
QUESTION = text_part("What is it?")


@pytest.fixture
def processor(byte_tokenizer):
    return StubProcessor(byte_tokenizer)


@pytest.fixture
def encode_images(byte_tokenizer, processor):
    return lambda messages, **settings: encode_chat(
        byte_tokenizer, messages, processor=processor, **settings
    )


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_parts_keep_their_order(encode_images, processor):
    encoded = encode_images([user(image_part(ONE), QUESTION, image_part(TWO))])
    assert processor.texts == [
        "<|start|>user: <image>What is it?<image><|end|><|start|>assistant: "
    ]
    first, second = encoded.images.images
    assert second.first - first.end == len("What is it?")
    assert encoded.images.is_feature.sum() == 2 * FEATURES


def test_every_place_has_its_own_picture(encode_images):
    def pixels(*pictures):
        images = encode_images([user(*map(image_part, pictures))]).images.images
        return [image.inputs["pixels"].tolist() for image in images]

    assert pixels(TWO, ONE) == pixels(TWO) + pixels(ONE)


def test_prompts_without_images_do_not_meet_the_processor(encode_images, processor):
    encoded = encode_images([user(text_part("a"), text_part("b"))])
    assert encoded.images is None
    assert encoded == encode_images([{"role": "user", "content": "ab"}])
    assert not processor.texts


def test_a_target_without_images_is_told_by_name(byte_tokenizer):
    reason = "SmolLM2 takes no images: it has no vision tower"
    with pytest.raises(PromptError, match=reason):
        encode(byte_tokenizer, [user(image_part(ONE))], processor=reason)
    with pytest.raises(PromptError, match="this command takes no images"):
        encode(byte_tokenizer, [user(image_part(ONE))])


def test_the_limit_of_images(encode_images):
    messages = [user(*[image_part(ONE)] * 3)]
    with pytest.raises(PromptError, match="the prompt has 3 images, and the limit is 2"):
        encode_images(messages, max_images=2)
    assert len(encode_images(messages, max_images=3).images.images) == 3
    with pytest.raises(PromptError, match="17 images, and the limit is 16"):
        encode_images([user(*[image_part(ONE)] * 17)])


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_and_tools_have_images(encode_images, role):
    messages = [{"role": role, "content": [image_part(ONE)]}, user(QUESTION)]
    with pytest.raises(PromptError, match="only messages of the user and of tools"):
        encode_images(messages)


def test_images_in_results_of_tools_go_to_the_user(encode_images, processor):
    """Templates show no images of tools, and the results of one turn stay together."""

    def tool(*parts):
        return {"role": "tool", "tool_call_id": "1", "content": list(parts)}

    results = [tool(text_part("a"), image_part(ONE)), tool(image_part(TWO), text_part("b"))]
    start, end = "<|start|>tool: a<|end|><|start|>tool: b<|end|>", "<|end|><|start|>assistant: "
    encode_images(results)
    assert processor.texts.pop() == f"{start}<|start|>user: <image><image>{end}"
    encode_images([*results, {"role": "user", "content": "Well?"}])
    assert processor.texts.pop() == f"{start}<|start|>user: <image><image>Well?{end}"
    encode_images([*results, user(image_part(ONE))])
    assert processor.texts.pop() == f"{start}<|start|>user: <image><image><image>{end}"
    encode_images([*results, {"role": "assistant", "content": "I see."}])
    assert "<image><image><|end|><|start|>assistant: I see." in processor.texts.pop()


def test_a_placeholder_in_a_text_is_refused(encode_images):
    with pytest.raises(PromptError, match="placeholders"):
        encode_images([user(image_part(ONE), text_part("<image>"))])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image", "image": None},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "video", "video": "a.mp4"},
        {"type": "text", "text": 3},
        "a",
    ],
)
def test_other_parts_are_refused(byte_tokenizer, processor, part):
    with pytest.raises(PromptError, match="only texts are supported, and images in the form"):
        encode(byte_tokenizer, [user(part)], processor=processor)


class TestChatTemplates:
    def rendered(self, tokenizer, template, *messages):
        tokenizer = replace_template(tokenizer, template)
        return tokenizer.decode(tokenizer.chat(messages))

    def test_a_template_of_parts_gets_texts_as_parts(self, byte_tokenizer):
        template = (
            "{% for m in messages %}{{ m.role }}:{% if m.content[0].type == 'image' %}{% endif %}"
            "{% for x in m.content %}{{ x.text }}{% endfor %};{% endfor %}"
        )
        messages = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
        assert self.rendered(byte_tokenizer, template, *messages) == "system:Be brief.;user:Hi;"

    def test_a_template_of_strings_gets_strings(self, byte_tokenizer):
        template = "{% for m in messages %}{{ m.role + ':' + m.content }};{% endfor %}"
        message = {"role": "user", "content": "Hi"}
        assert self.rendered(byte_tokenizer, template, message) == "user:Hi;"


def replace_template(tokenizer, template):
    copied = deepcopy(tokenizer.transformers)
    copied.chat_template = template
    return Tokenizer(copied, tokenizer.stop_token_ids)


class TestRows:
    def read(self, tmp_path, *rows, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(file, **settings)

    def test_images_stand_before_the_prompt(self, tmp_path):
        (row,) = self.read(tmp_path, {"prompt": "Hi", "images": ["a.png", "b.png"]}, images=True)
        parts = [image_part("a.png"), image_part("b.png"), text_part("Hi")]
        assert row.turns == ((user(*parts),),)

    def test_messages_have_parts(self, tmp_path):
        message = user(QUESTION, image_part("a.png"))
        text = user(text_part("a"), text_part("b"))
        (row,) = self.read(tmp_path, {"messages": [text, message]}, images=True)
        assert row.turns == (({"role": "user", "content": "ab"}, message),)

    def test_paths_are_relative_to_the_file(self, tmp_path):
        url = url_of(ONE)
        message = user(*map(image_part, ["a.png", url, "/b.png", "http://c/d.png"]))
        ((first, second, third, fourth),) = (
            [part["image"] for part in found["content"]]
            for found in find_images([message], tmp_path)
        )
        assert str(first) == str(tmp_path / "a.png")
        assert (second, str(third), fourth) == (url, "/b.png", "http://c/d.png")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"turns": ["a"], "images": ["a.png"]}, "'images' must be a list of files beside"),
            ({"prompt": "a", "images": "a.png"}, "'images' must be a list of files beside"),
            ({"prompt": "a", "images": [None]}, "only texts are supported"),
        ],
    )
    def test_what_is_no_list_of_files(self, tmp_path, row, message):
        with pytest.raises(PromptError, match=message):
            self.read(tmp_path, row, images=True)

    def test_other_commands_refuse_rows_with_images(self, tmp_path):
        with pytest.raises(PromptError, match=r":1: the row has images, which only treeflash gen"):
            self.read(tmp_path, {"prompt": "a", "images": ["a.png"]})


OPTIONS = {"max_tokens": 24, "temperature": 2.0, "seed": 3}
PROMPTS = [[user(image_part(image), QUESTION)] for image in (ONE, TWO)]


@pytest.fixture(scope="module")
def model(tiny_pair):
    model = reference_model(*tiny_pair)
    model.backend.images = StubProcessor(model.tokenizer)
    return model


@pytest.fixture(scope="module")
def answers(model):
    """The answers of plain decoding."""
    return [model.generate(x, **OPTIONS, method="ar") for x in PROMPTS]


class TestModels:
    """The calls of the Python API."""

    def test_every_call_gives_the_text_of_plain_decoding(self, model, answers):
        expected = [answer.text for answer in answers]
        assert expected[0] != expected[1]
        assert [model.generate(prompt, **OPTIONS).text for prompt in PROMPTS] == expected
        streams = [model.stream(prompt, **OPTIONS) for prompt in PROMPTS]
        assert ["".join(chunk.text for chunk in stream) for stream in streams] == expected
        many = dict(model.generate_many(PROMPTS, **OPTIONS))
        assert [many[0].text, many[1].text] == expected

        async def ask():
            return await asyncio.gather(*(model.agenerate(x, **OPTIONS) for x in PROMPTS))

        assert [answer.text for answer in asyncio.run(ask())] == expected

    def test_several_answers(self, model, answers):
        found = [x for _, x in model.generate_many(PROMPTS[:1], n=2, **OPTIONS)]
        found.sort(key=lambda answer: answer.seed)
        assert found[0].text == answers[0].text
        later = model.generate(PROMPTS[0], **{**OPTIONS, "seed": 4})
        assert found[1].text == later.text

    def test_placeholders_are_counted(self, model, answers):
        text = model.generate([user(QUESTION)], **OPTIONS, template_args=None)
        assert answers[0].prompt_tokens - text.prompt_tokens == FEATURES

    def test_the_name_of_a_target_that_takes_none(self, tiny_pair):
        model = reference_model(*tiny_pair)
        with pytest.raises(PromptError, match=r"^target takes no images: the backend does not"):
            model.generate(PROMPTS[0])
        with pytest.raises(PromptError, match=r"^prompt 0: target takes no images"):
            model.generate_many(PROMPTS)
