"""Images in requests: nothing that is fetched, hostile and odd images, and limits."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from recordings import recording

pytest.importorskip("PIL.Image")
from bodies import CHAT, MESSAGES, RESPONSES, USER, chat, messages, ollama, responses
from protocols import Ask
from protocols.chat import Chat
from protocols.messages import Messages
from scripted_model import reference_model
from servers import NAME, check_error, parse, serving, wait_until
from stub_images import (
    FEATURES,
    StubProcessor,
    base64_of,
    claiming,
    picture,
    url_of,
)

from treeflash.text.prompt import image_part, text_part

pytestmark = pytest.mark.sample(1)

QUESTION = "?"
OPTIONS = {"max_tokens": 16}
DEFAULTS = {"temperature": 0.3, "seed": 3}  # Anthropic's API and Responses have no seed


@pytest.fixture(scope="module")
def image_server(image_model):
    with serving(image_model, DEFAULTS) as running:
        yield running


def openai_messages(*images, text=QUESTION):
    return Chat().body(Ask(text, images=list(map(base64_of, images))))["messages"]


def anthropic_messages(*images):
    return Messages().body(Ask(QUESTION, images=list(map(base64_of, images))))["messages"]


def chat_text(server, *images):
    body = server.post(CHAT, {"messages": openai_messages(*images), **OPTIONS}).json()
    return body["choices"][0]["message"]["content"]


def expected(model, *images):
    parts = [*map(image_part, images), text_part(QUESTION)]
    return model.generate([{"role": "user", "content": parts}], method="ar", **OPTIONS, **DEFAULTS)


def test_counted_tokens(image_server):
    asked = openai_messages(picture(1))
    body = image_server.post("/tokenize", {"messages": asked}).json()
    without = image_server.post("/tokenize", {"messages": openai_messages()}).json()
    assert body["count"] == len(body["tokens"]) == without["count"] + FEATURES
    counted = image_server.post(
        f"{MESSAGES}/count_tokens", {"messages": anthropic_messages(picture(1))}
    )
    assert counted.json() == {"input_tokens": body["count"]}


def test_a_conversation_comes_from_the_cache_up_to_another_image(image_server):
    first, other = openai_messages(picture(21)), openai_messages(picture(22))

    def cached(messages):
        body = image_server.post(CHAT, {"messages": messages, **OPTIONS}).json()
        return body["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached(first)
    prefix = len("<start>user: ") - len("start>")
    assert cached(first) > prefix + FEATURES
    assert cached(other) <= prefix


IMAGE_FILE = {"type": "text", "text": "a.png"}
READ = {"type": "tool_use", "id": "a", "name": "read", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a"}


def anthropic_result(image):
    """An image that a tool has read, and words of the user."""
    first, *content = anthropic_messages(image)[0]["content"]
    result = {**RESULT, "content": [IMAGE_FILE, first]}
    return [
        *anthropic_messages(),
        {"role": "assistant", "content": [READ]},
        {"role": "user", "content": [result, *content]},
    ]


def response_items(image):
    call = {"type": "function_call", "call_id": "a", "name": "read", "arguments": "{}"}
    output = [{"type": "input_image", "image_url": url_of(image)}]
    result = {"type": "function_call_output", "call_id": "a", "output": output}
    return [{"role": "user", "content": "Read it."}, call, result]


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        (messages(messages=anthropic_result(picture(1))), "tool: a.png<|end|>"),
        (responses(input=response_items(picture(1))), "tool: <|end|>"),
    ],
    ids=["Messages", "Responses"],
)
def test_results_of_tools(image_server, image_model, request_, shown):
    """Agents read images with tools; templates show them in the user's message after it."""
    image_model.backend.images.texts.clear()
    response = image_server.post(*request_)
    assert response.status_code == 200, response.text
    assert f"{shown}<|start|>user: <image>" in image_model.backend.images.texts[0]


def bodies(url, data="AAAA"):
    """A request of each protocol with an image elsewhere."""
    user = {"role": "user"}
    image_url = {"type": "image_url", "image_url": {"url": url}}
    yield CHAT, {"messages": [{**user, "content": [image_url]}]}
    yield "/tokenize", {"messages": [{**user, "content": [image_url]}]}
    part = {"type": "input_image", "image_url": url}
    yield RESPONSES, {"input": [{**user, "content": [part]}]}
    for source in ({"type": "url", "url": url}, {"type": "file", "file_id": url}):
        block = {"type": "image", "source": source}
        result = {"type": "tool_result", "tool_use_id": "a", "content": [block]}
        for content in (block, result):
            yield MESSAGES, {"messages": [{**user, "content": [content]}], "max_tokens": 4}
            yield f"{MESSAGES}/count_tokens", {"messages": [{**user, "content": [content]}]}


@contextmanager
def listener():
    """A server that fails the test if anything connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening.getsockname()[1]
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_nothing_is_fetched_or_opened(image_server, tmp_path):
    """Whatever a URL names, the answer is the same error, and nothing connects."""
    path = tmp_path / "secret.png"
    path.write_bytes(picture(1))
    with recording(socket, "getaddrinfo") as looked_up, listener() as port:
        urls = [
            f"http://127.0.0.1:{port}/a.png",
            f"https://localhost:{port}/a.png",
            "ftp://images.invalid/a.png",
            "http://169.254.169.254/latest/meta-data",
            f"file://{path}",
            str(path),
            "file-abc123",
            "DATA:image/png;base64,AAAA",
            "",
        ]
        for url in urls:
            for address, body in bodies(url):
                says = "images are never fetched or opened by this server"
                assert str(path) not in check_error(image_server.post(address, body), 400, says)
    assert not [host for host, *_ in looked_up if host != "127.0.0.1"]
    for text in (str(path), f"file://{path}"):
        request = ollama("chat", messages=[USER | {"images": [text]}])
        check_error(image_server.post(*request), 400, "is not base64")


@pytest.fixture(scope="module")
def streaming_text(image_server, image_model):
    """A text that streams meanwhile: it starts before the image, and equals Python's text."""
    options = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 128}
    expected = image_model.generate(options["messages"], method="ar", max_tokens=128, **DEFAULTS)

    @contextmanager
    def streaming_text():
        body = {**options, "stream": True}
        with image_server.client.stream("POST", CHAT, json=body) as response:
            events = parse(response)
            seen = [next(events), next(events)]
            yield
            seen += events
        text = "".join(x["delta"].get("content") or "" for event in seen for x in event["choices"])
        assert text == expected.text

    return streaming_text


def test_a_hostile_image_ends_its_request_alone(image_server, streaming_text):
    with streaming_text():
        messages = openai_messages(picture(1), claiming(60_000, 60_000))
        response = image_server.post(CHAT, {"messages": messages})
        check_error(response, 400, "image 2: the image has more than 32 megapixels")


def test_limits(image_model):
    with serving(image_model, {"max_images": 2}) as server:
        assert chat_text(server, picture(1), picture(2))
        response = server.post(CHAT, {"messages": openai_messages(*[picture(1)] * 3)})
        check_error(response, 400, "the prompt has 3 images, and the limit is 2")


def test_bodies_may_be_larger_where_images_are_taken(server, image_server):
    path, body = chat(pad="x" * (9 << 20))
    assert server.post(path, body).status_code == 413
    check_error(image_server.post(path, body), 400, "pad")
    assert image_server.post(path, {"pad": "x" * (33 << 20)}).status_code == 413


def test_what_clients_are_told_about_the_model(server, image_server):
    for running, inputs in ((server, ["text"]), (image_server, ["text", "image"])):
        (model,) = running.client.get("/v1/models").json()["data"]
        assert model["input_modalities"] == inputs
        shown = running.post("/api/show", {"model": NAME}).json()
        assert ("vision" in shown["capabilities"]) == ("image" in inputs)


def test_answers_go_on_while_images_are_processed(folders):
    """Two images are processed at once, outside of the event loop and of the scheduler."""
    model = reference_model(*folders)
    model.backend.images = processor = StubProcessor(model.tokenizer)
    inside, release = [], threading.Event()
    encode = processor.encode

    def held(text, pictures):
        inside.append(text)
        assert release.wait(60)
        return encode(text, pictures)

    processor.encode = held
    with serving(model, DEFAULTS) as server, ThreadPoolExecutor(4) as pool:
        try:
            asked = [pool.submit(chat_text, server, picture(seed)) for seed in range(4)]
            wait_until(lambda: len(inside) == 2)
            assert server.chat(max_tokens=4).status_code == 200
            assert len(inside) == 2
        finally:
            release.set()
        texts = [expected(model, picture(seed)).text for seed in range(4)]
        assert len(set(texts)) == 4
        assert [x.result() for x in asked] == texts
