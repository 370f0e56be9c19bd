"""The page in Chromium: chat, draft trees, comparison, sizes, keyboard, and hostile text."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from servers import PATIENCE, Gate, serving, wait_until
from stub_images import StubProcessor, base64_of, picture, url_of

from treeflash.config import LoadConfig
from treeflash.language_model import LanguageModel
from treeflash.text.images import read_image
from treeflash.text.tokenizer import Tokenizer

sync_api = pytest.importorskip("playwright.sync_api")
# Chromium is needed; `test_page.py` has the page's files and their policy.
pytestmark = pytest.mark.nightly

TOKENS, QUESTION = 12, "?"

CHROMIUM = "/usr/bin/chromium"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is missing")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        sync_api.expect.set_options(timeout=1000 * PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open the page of a server; errors and violations of the policy fail the test."""
    contexts, problems = [], []

    def noted(text):
        # Chromium notes every request that is refused or fails.
        if "status of 4" not in text and "net::ERR_FAILED" not in text:
            problems.append(text)

    def open_page(url, width=1280, height=800, dark=False):
        scheme = "dark" if dark else "light"
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        context.set_default_timeout(1000 * PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda x: noted(x.text) if x.type == "error" else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems, problems


@pytest.fixture
def page(server, open_page):
    return open_page(server.url)


def ask(page, text, *tokens):
    """Send a message and wait for the answer: the server's, or these tokens."""
    if tokens:
        fake(page, *tokens)
    send(page, text)
    page.get_by_role("button", name="Send").wait_for()


def fake(page, *tokens):
    """Answer with these tokens, two of each iteration's draft tree accepted."""
    trees = []
    for i, text in enumerate(tokens):
        tree = {"iteration": i, "seconds": 0.01, "tokens": [text]}
        if i:
            nodes = [tokens[i - 1], text, " other", HOSTILE, " and", " so", " on", "\n", " or"]
            parents = [-1, 0, 0, 1, 1, 2, 5, 2, 0]
            tree |= {"nodes": nodes, "parents": parents, "path": [0, 1]}
        trees.append(tree)
    answer_with(page, trees)


def sent_by(page):
    """The bodies of requests for answers, which grows."""
    sent = []
    page.on("request", lambda x: sent.append(x.post_data_json) if x.method == "POST" else None)
    return sent


def refuse(page):
    error = {"error": {"message": "the queue is full"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=error))


def send(page, text="Hi"):
    """Send a message without waiting for the answer."""
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def choose(page, content):
    """Choose a file with an image, and wait until it is shown."""
    files = [{"name": "a.png", "mimeType": "image/png", "buffer": content}]
    page.locator("#files").set_input_files(files)
    page.locator("#images img").wait_for()


def allow_clipboard(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])


def overflow(page):
    """How many pixels the page is wider than its window."""
    element = "document.documentElement"
    return page.evaluate(f"{element}.scrollWidth - {element}.clientWidth")


CHAIN = {"nodes": ["a", "b"], "parents": [-1, 0], "path": [0, 1]}


def answer_with(page, trees, thoughts=0):
    """Answer with the tokens of these iterations, of which the first ones are thoughts."""
    frames = []
    for i, tree in enumerate(trees):
        field = "reasoning_content" if i < thoughts else "content"
        choice = {"index": 0, "delta": {field: "".join(tree["tokens"])}, "draft_tree": tree}
        frames.append("data: " + json.dumps({"choices": [choice]}) + "\n\n")
    body = "".join([*frames, "data: [DONE]\n\n"])
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )


def test_a_choice_of_models(serve_models, loads, open_page):
    """It is kept for the next page, and the server loads what is chosen."""
    server = serve_models()
    page = open_page(server.url)
    choice = page.get_by_label("Model", exact=True)
    sync_api.expect(choice).to_have_value("One")
    assert choice.locator("option").all_inner_texts() == ["One", "two", "org/three"]
    choice.select_option("two")
    page.locator("#length").evaluate("x => { x.value = 32; }")
    ask(page, "Name a river.")
    sync_api.expect(page.locator(".assistant")).to_have_count(1)
    assert loads.counts == {"two": 1}
    page.reload()
    sync_api.expect(choice).to_have_value("two")


def test_a_chat(page):
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    page.get_by_label("Compare with plain").check()
    page.locator("#length").evaluate("x => { x.value = 32; }")  # room for both answers
    ask(page, "Name a river.")
    spans = page.locator(".assistant .token")
    iterations = {int(x.get_attribute("data-iteration")) for x in spans.all()}
    assert iterations == set(range(max(iterations) + 1))
    assert page.locator("#tree circle").count() >= 1
    sync_api.expect(page.locator("#verdict")).to_contain_text("gives the same text")
    for name in ("tree", "plain"):
        assert float(page.locator(f"#{name}-speed").inner_text()) > 0
    assert float(page.locator("#plain-efficiency").inner_text()) == 1
    ask(page, "And another.")
    assert page.locator(".error").count() == 0
    assert page.locator(".turn.user").count() == 2
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    assert page.locator("#tree-speed").inner_text() == "\u2013"


def test_hostile_text_is_shown_as_text(page):
    ask(page, HOSTILE, "A", HOSTILE, " z")
    assert page.title() == "treeflash"
    assert page.locator("#log img, #log script, #tree img").count() == 0
    assert page.locator(".assistant .tokens").inner_text().endswith(f"A{HOSTILE} z")
    page.get_by_label("Show Markdown").check()
    assert page.title() == "treeflash"
    assert page.locator("#log img, #log script").count() == 0
    assert HOSTILE in page.locator(".formatted").inner_text()


LINK = "[x](javascript:alert(1))"
AS_WRITTEN = r"- [x] \(a_1\) ![Main](https://x.y/z)"
TABLE = "| a | b |\n| - | - |\n| 1 | 2 |"
MARKDOWN = f"# Rivers\n\n{TABLE}\n\n- **Rhine**\n- {LINK}\n- 3 \\* 4\n{AS_WRITTEN}\n"


def test_markdown_and_copy(page):
    allow_clipboard(page)
    ask(page, "Hi", *(MARKDOWN[i : i + 9] for i in range(0, len(MARKDOWN), 9)))
    assert not page.locator(".formatted").is_visible()
    page.get_by_label("Show Markdown").check()
    formatted = page.locator(".formatted")
    assert formatted.locator("h1").inner_text() == "Rivers"
    assert formatted.locator("strong").inner_text() == "Rhine"
    assert formatted.locator("td").count() == 2
    assert formatted.locator("[href]").count() == 0
    assert formatted.locator("li").nth(2).inner_text() == "3 * 4"
    assert formatted.locator("li").last.inner_text() == AS_WRITTEN.removeprefix("- ")
    assert not page.locator(".tokens").is_visible()
    page.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN


def test_thoughts_are_not_copied(page):
    allow_clipboard(page)
    tokens = ["<b>First", ", think.", "# Rhine"]
    trees = [{"iteration": i, "seconds": 0.01, "tokens": [x]} for i, x in enumerate(tokens)]
    answer_with(page, trees[:1] + [tree | CHAIN for tree in trees[1:]], thoughts=2)
    page.get_by_label("Show Markdown").check()
    ask(page, "Hi")
    assert page.locator(".formatted .thought").inner_text() == "<b>First, think."
    assert page.locator(".formatted h1").inner_text() == "Rhine"
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "# Rhine"


def test_an_answer_that_no_parser_can_lay_out_is_shown_as_it_is(page):
    page.get_by_label("Show Markdown").check()
    ask(page, "Hi", ">" * 20_000)
    page.reload()
    sync_api.expect(page.locator(".formatted")).to_have_text(">" * 20_000)
    ask(page, "And another.")


def test_an_answer_that_is_still_growing_is_shown_beside_markdown(serve, open_page):
    server = serve()
    page = open_page(server.url)
    page.get_by_label("Show Markdown").check()
    with Gate(server.engine) as gate:
        send(page)
        wait_until(lambda: server.engine.unfinished)
        gate.allow(8)
        page.locator(".token:not(:empty)").first.wait_for()
        page.get_by_role("button", name="Stop").click()


def test_copy_without_the_interface_for_the_clipboard(page):
    """Browsers keep it from pages of other machines without TLS."""
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    ask(page, "Hi", "The", " Rhine")
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    page.get_by_label("Message").focus()
    page.keyboard.press("Control+V")
    assert page.get_by_label("Message").input_value() == "The Rhine"


def test_a_browser_may_keep_nothing_for_pages(page):
    refuse = "get() { throw new DOMException('refused', 'SecurityError'); }"
    page.context.add_init_script(f"Object.defineProperty(window, 'localStorage', {{ {refuse} }});")
    page.reload()
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    ask(page, "Name a river.")
    sync_api.expect(page.locator(".assistant .token").first).to_be_visible()


def test_each_tab_keeps_its_chat(page, server):
    ask(page, "Name a river.", "The", " Rhine")
    other = page.context.new_page()
    other.goto(server.url)
    assert other.locator(".turn").count() == 2  # a new tab goes on
    other.get_by_role("button", name="New chat").click()
    page.reload()
    assert page.locator(".user").inner_text() == "Name a river."


def test_a_chat_survives_a_reload(page):
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Compare with plain").uncheck()
    ask(page, "Name a river.", "The", " Rhine")
    page.reload()
    sent = sent_by(page)
    assert page.locator(".user").inner_text() == "Name a river."
    assert "The Rhine" in page.locator(".assistant").inner_text()
    ask(page, "And another.")
    roles = [message["role"] for message in sent[0]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert sent[0]["seed"] == 7
    page.get_by_role("button", name="New chat").click()
    page.reload()
    assert page.locator(".turn").count() == 0


LEFT = "x => x.scrollHeight - x.scrollTop - x.clientHeight"


@pytest.mark.parametrize("markdown", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_a_reload_shows_the_last_message(server, open_page, markdown, width, height):
    page = open_page(server.url, width, height)
    page.get_by_label("Show Markdown").set_checked(markdown)
    for i in range(4):
        ask(page, "Tell me more.", *(f"{i}, line {n}.\n\n" for n in range(30)))
    page.reload()
    page.locator(".assistant").last.wait_for()
    assert page.locator("#log").evaluate(LEFT) <= 1
    ask(page, "And then?", "The", " end")
    assert page.locator("#log").evaluate(LEFT) <= 1


def test_a_long_prompt_shows_its_progress(serve, open_page):
    server = serve()
    scheduler = server.engine.scheduler
    scheduler.config = replace(scheduler.config, lone_prefill_chunk=64)
    page = open_page(server.url)
    with Gate(server.engine) as gate:
        send(page, "Once upon a time. " * 10)
        wait_until(lambda: server.engine.unfinished)
        gate.allow(1)
        note = page.locator(".assistant .note")
        sync_api.expect(note).to_contain_text("Reading the prompt: 64 of")
        gate.allow(1)
        sync_api.expect(note).to_contain_text("Reading the prompt: 128 of")
    page.get_by_role("button", name="Send").wait_for()
    sync_api.expect(page.locator(".assistant .note")).to_have_text("")


@pytest.mark.parametrize("crash", [False, True])
def test_what_was_streamed_survives(serve, open_page, crash):
    server = serve()
    page = open_page(server.url)
    page.clock.install()
    with Gate(server.engine) as gate:
        send(page)
        wait_until(lambda: server.engine.unfinished)
        gate.allow(6)
        page.locator(".token:not(:empty)").first.wait_for()
        streamed = page.locator(".assistant .tokens").text_content()
        if crash:  # a new tab has what is stored without a goodbye
            page.clock.fast_forward(1000)
            page = page.context.new_page()
            page.goto(server.url)
        else:
            page.reload()
        stopped = page.locator(".assistant", has_text="Stopped")
        sync_api.expect(stopped.locator(".tokens")).to_have_text(streamed)
        assert page.locator(".user").inner_text() == "Hi"
    sent = sent_by(page)
    ask(page, "And another.", "The", " Rhine")
    assert [message["role"] for message in sent[0]["messages"]] == ["user", "assistant", "user"]
    assert sent[0]["messages"][1] == {"role": "assistant", "content": streamed}
    sync_api.expect(page.get_by_text("Stopped")).to_have_count(1)


def test_a_message_without_an_answer_survives_a_reload(page):
    ask(page, "Name a river.", "The", " Rhine")
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: None)
    message = page.get_by_label("Message")
    message.fill("And another.")
    with page.expect_request("**/v1/chat/completions"):
        page.keyboard.press("Enter")
    page.reload()
    sync_api.expect(message).to_have_value("And another.")
    assert page.locator(".user").all_inner_texts() == ["Name a river."]


def test_thoughts_survive_a_reload(page):
    trees = [{"iteration": i, "seconds": 0.01, "tokens": [x]} for i, x in enumerate("ab")]
    answer_with(page, [tree | CHAIN for tree in trees], thoughts=1)
    ask(page, "Hi")
    page.reload()
    assert page.locator(".tokens .thought").inner_text() == "a"
    sent = sent_by(page)
    ask(page, "And another.")
    assert sent[0]["messages"][1] == {"role": "assistant", "content": "b"}


def test_the_last_answer_is_regenerated(page):
    again = page.get_by_role("button", name="Regenerate")
    for name in ("Rhine", "Elbe"):
        ask(page, f"Is it the {name}?", "The", f" {name}")
    refuse(page)
    again.click()  # there is one: of the last answer
    sync_api.expect(page.locator(".error")).to_have_text("the queue is full")
    assert page.locator(".tokens").all_inner_texts() == ["The Rhine", "The Elbe"]
    assert page.get_by_label("Message").input_value() == ""
    sent = sent_by(page)
    fake(page, "The", " Oder")
    again.focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".tokens")).to_have_text(["The Rhine", "The Oder"])
    assert [message["content"] for message in sent[0]["messages"]] == [
        "Is it the Rhine?",
        "The Rhine",
        "Is it the Elbe?",
    ]
    sync_api.expect(page.get_by_label("Message")).to_be_focused()
    page.reload()
    assert page.locator(".tokens").all_inner_texts() == ["The Rhine", "The Oder"]


@pytest.mark.parametrize("width", [360, 1280])
def test_an_earlier_message_is_edited(images, open_page, width):
    page = open_page(images.url, width)
    choose(page, picture(1))
    ask(page, "Name it.", "The", " Rhine")
    ask(page, "And another.")
    message = page.get_by_label("Message")
    message.fill("Draft")
    first = page.get_by_role("button", name="Edit").first
    for leave in ("Escape", "Cancel"):
        first.click()
        sync_api.expect(message).to_be_focused()
        assert message.input_value() == "Name it."
        assert page.locator("#images img").count() == 1
        assert page.locator(".replaced").count() == 4
        sync_api.expect(page.locator("#editing")).to_contain_text("faded")
        if leave == "Escape":
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name=leave).click()
        assert message.input_value() == "Draft"
        assert page.locator("#images img, .replaced").count() == 0
    first.click()
    assert message.bounding_box()["width"] >= 144  # beside three buttons
    refuse(page)
    ask(page, "What is it?")
    assert page.locator(".tokens").count() == 2  # and it can be sent again
    assert message.input_value() == "What is it?"
    assert page.locator(".replaced").count() == 4
    sent = sent_by(page)
    fake(page, "A", " ship")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".tokens")).to_have_text(["A ship"])
    assert page.locator(".user").all_inner_texts() == ["What is it?"]
    assert message.input_value() == "Draft"
    (asked,) = sent[0]["messages"]
    assert [part["type"] for part in asked["content"]] == ["image_url", "text"]
    assert page.locator(".user img").count() == 1


def test_sending_while_the_plain_answer_is_decoded(page):
    fake(page, "The", " Rhine")
    held = []

    def hold(route):
        if route.request.post_data_json.get("method") == "ar":
            held.append(route)
        else:
            route.fallback()

    page.route("**/v1/chat/completions", hold)
    page.get_by_label("Compare with plain").check()
    ask(page, "Name a river.")
    sync_api.expect(page.locator("#verdict")).to_contain_text("plainly")
    ask(page, "And another.")
    assert page.locator(".turn.user").count() == 2
    assert page.locator(".error").count() == 0
    assert len(held) >= 1


def test_an_answer_is_computed_once_unless_a_comparison_is_asked_for(page):
    sent = sent_by(page)
    ask(page, "Name a river.", "The", " Rhine")
    ask(page, "And another.")
    assert [request.get("method") for request in sent] == [None, None]


def test_a_shadow_says_that_a_long_chain_goes_on(server, open_page):
    page = open_page(server.url, 390, 800)
    chain = {"nodes": ["a"] * 12, "parents": list(range(-1, 11)), "path": [0, 1]}
    trees = [{"iteration": i, "seconds": 0.01, "tokens": ["a"], **chain} for i in range(2)]
    answer_with(page, trees)
    ask(page, "Hi")
    tree = page.locator("#tree")
    tree.scroll_into_view_if_needed()
    box = tree.bounding_box()
    corner = {"x": box["x"] + box["width"] - 8, "y": box["y"] + 80, "width": 8, "height": 8}
    before = page.screenshot(clip=corner)
    assert tree.evaluate("x => x.scrollWidth - x.clientWidth") > 0
    tree.evaluate("x => { x.scrollLeft = x.scrollWidth; }")
    assert page.screenshot(clip=corner) != before


def test_the_end_of_an_answer_and_its_button_stay_in_view(page):
    ask(page, "Go on.", *("A line of a long answer.\n" for _ in range(60)))
    sync_api.expect(page.get_by_role("button", name="Copy")).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_missing_key_is_asked_for_beside_the_error(serve, open_page, width, dark):
    page = open_page(serve(api_keys=("right",)).url, width, 800, dark)
    key = page.get_by_label("API key")
    sync_api.expect(key).to_be_focused()
    ask(page, "Name a river.")
    error = page.locator(".error")
    sync_api.expect(error).to_be_in_viewport(ratio=1)
    sync_api.expect(error).to_have_text("a valid API key is needed; enter it below")
    header = page.locator("#model")
    assert header.inner_text() == "API key needed"
    assert header.evaluate("x => x.scrollWidth - x.clientWidth") == 0, "it is cut off"
    sync_api.expect(key).to_be_in_viewport(ratio=1)
    assert page.locator(".assistant, .user").count() == 0
    assert page.get_by_label("Message").input_value() == "Name a river."  # to be sent again
    key.fill("wrong")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#model")).to_have_text("wrong API key")
    sync_api.expect(key).to_be_visible()
    key.fill("ключ")  # no header can hold it
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#model")).to_contain_text("key")
    key.fill("right")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    assert page.locator(".error").count() == 0
    page.keyboard.press("Enter")  # the message has the focus
    page.locator(".assistant .token").first.wait_for()
    sync_api.expect(key).to_be_hidden()


def test_by_keyboard(page):
    fake(page, "The", " Rhine", " flows", " north")
    page.keyboard.type("Hi")  # the message has the focus
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send").wait_for()
    assert "iteration 3" in page.locator("#caption").inner_text()
    page.get_by_label("Iteration", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    assert "iteration 2" in page.locator("#caption").inner_text()
    assert page.locator(".shown").all_inner_texts() == [" flows"]
    page.get_by_label("Budget").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#budget-value").inner_text() == "1"
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"prompt", "send", "log", "budget", "temperature", "compare", "iteration"} <= reached


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_sizes_and_schemes(server, open_page, width, dark):
    page = open_page(server.url, width, 740, dark)
    words = 6 * ["The", "Rhine", "is", "a", "river", "of", "Europe."]
    ask(page, "Which river flows through Cologne?", *(f"{word} " for word in words))
    assert overflow(page) == 0
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 200) == dark


def test_stop(page):
    page.locator("#length").evaluate("x => { x.max = x.value = 100000; }")
    send(page, "Go on.")
    page.locator(".token").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Send").wait_for()
    assert page.locator(".error").count() <= 1


def test_a_message_that_was_not_answered_can_be_sent_again(page):
    held = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    message = page.get_by_label("Message")
    for key in ("Escape", None):
        message.fill("Hi")
        with page.expect_request("**/v1/chat/completions"):
            page.keyboard.press("Enter")
        page.keyboard.type("Next")  # the focus stayed
        if key:
            page.keyboard.press(key)
        else:
            held[-1].abort()
        sync_api.expect(message).to_have_value("Hi\nNext")
        assert page.locator(".user, .assistant").count() == 0
    assert page.locator(".error").inner_text() == "the server cannot be reached"


def test_a_server_that_cannot_be_reached_is_told(page):
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    sync_api.expect(page.locator("#model")).to_have_text("the server cannot be reached")


def test_input_methods_do_not_send(page):
    """Safari says only by its code that a key ends a composition."""
    page.get_by_label("Message").fill("ライン川")
    key = {"key": "Enter", "keyCode": 229, "cancelable": True, "bubbles": True}
    page.locator("#prompt").dispatch_event("keydown", key)
    assert page.locator(".user").count() == 0


def test_each_paragraph_has_the_direction_of_its_script(page):
    ask(page, "Hi", "نهر", " الراين")
    place, token = (page.locator(x).first.bounding_box() for x in (".tokens", ".token"))
    assert token["x"] > place["x"] + place["width"] / 2


@pytest.fixture(scope="module")
def images(image_model):
    """A server of a model that takes images."""
    with serving(image_model) as running:
        yield running


TRANSFER = """bytes => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], "a.png", {type: "image/png"}));
  return transfer;
}"""

PASTE = """([make, bytes]) => document.getElementById("prompt").dispatchEvent(new ClipboardEvent(
  "paste", {clipboardData: eval(make)(bytes), cancelable: true}))"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_images_are_chosen_dropped_and_pasted(images, open_page, width, dark):
    page = open_page(images.url, width, 844, dark)
    sent = sent_by(page)
    chosen, dropped, pasted, removed = (picture(seed, 96) for seed in range(4))
    file = {"name": "a.png", "mimeType": "image/png"}
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Image", exact=True).click()
    chooser.value.set_files([{**file, "buffer": chosen}])
    waiting = page.locator("#images img")
    sync_api.expect(waiting).to_have_count(1)
    transfer = page.evaluate_handle(TRANSFER, list(dropped))
    page.dispatch_event(".chat", "dragover", {"dataTransfer": transfer})
    sync_api.expect(page.locator(".chat")).to_have_class("chat dropping")
    page.dispatch_event(".chat", "drop", {"dataTransfer": transfer})
    sync_api.expect(waiting).to_have_count(2)
    sync_api.expect(page.locator(".chat")).to_have_class("chat")
    for image in (pasted, removed):
        page.evaluate(PASTE, [TRANSFER, list(image)])
    sync_api.expect(waiting).to_have_count(4)
    page.get_by_role("button", name="Remove image 4").click()
    page.locator("#length").evaluate("x => { x.value = 32; }")
    ask(page, "What do they show?")
    assert waiting.count() == 0
    parts = sent[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts[:-1]]
    assert urls == [url_of(image) for image in (chosen, dropped, pasted)]
    assert parts[-1] == {"type": "text", "text": "What do they show?"}
    assert page.locator(".error").count() == 0
    assert page.locator(".user img").count() == 3
    assert overflow(page) == 0
    page.reload()
    assert page.locator(".user img").count() == 3
    ask(page, "And now?")
    assert sent[1]["messages"][0]["content"] == parts
    assert page.locator(".error").count() == 0
    page.get_by_role("button", name="New chat").click()
    assert page.locator("img").count() == 0


def test_large_images_are_scaled(images, open_page):
    page = open_page(images.url)
    sent = sent_by(page)
    large = io.BytesIO()
    Image.new("RGB", (4096, 1024), "lime").save(large, "PNG")
    choose(page, large.getvalue())
    ask(page, "Hi")
    url = sent[0]["messages"][0]["content"][0]["image_url"]["url"]
    pixels = read_image(url)
    assert pixels.shape == (512, 2048, 3)
    assert pixels[0, 0].tolist() == [0, 255, 0]


def test_a_file_that_is_no_image_is_told(images, open_page):
    page = open_page(images.url)
    files = [{"name": "a.png", "mimeType": "image/png", "buffer": b"?"}]
    page.locator("#files").set_input_files(files)
    sync_api.expect(page.locator(".error")).to_contain_text("a.png is not an image")
    assert page.locator("#images img").count() == 0


def test_images_of_a_message_that_failed_can_be_sent_again(images, open_page):
    page = open_page(images.url)
    refuse(page)
    choose(page, picture(1))
    ask(page, "Hi")
    assert "the queue is full" in page.locator(".error").inner_text()
    assert page.locator("#images img").count() == 1


def test_a_model_without_images_offers_none(page):
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    sync_api.expect(page.get_by_role("button", name="Image", exact=True)).to_be_hidden()


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A random Qwen3-VL with the processor of transformers, and its server."""
    for package in ("torchvision", "anthropic", "ollama", "openai"):
        pytest.importorskip(package)
    import transformers
    from treeflash_cuda.backend import load

    from tests.helpers.image_models import PROCESSORS, random_model

    transformers.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("vision")
    random_model("qwen3_vl").save_pretrained(folder)
    PROCESSORS["qwen3_vl"]().save_pretrained(folder)
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    template = StubProcessor.chat_template.replace("<image>", placeholder)
    (folder / "chat_template.jinja").write_text(template)
    backend = load(folder, None, LoadConfig(device="cpu", dtype="float32"))
    model = LanguageModel(backend, Tokenizer.from_folder(folder), folder, suffix=True)
    with serving(model, {"method": "suffix", "temperature": 0.0}) as running:
        yield running


@pytest.mark.parametrize("way", ["dropped", "pasted"])
def test_an_image_on_the_page_gives_the_text_of_every_client(vision, open_page, way):
    from protocols import PROTOCOLS, Ask

    def answers(image):
        asked = Ask(QUESTION, images=[base64_of(image)], max_tokens=TOKENS)
        apis = [api for api in PROTOCOLS if "images" in api.can]
        return {api.ask(vision.url, asked).text for api in apis}

    image, other = picture(1, 96), picture(2, 96)
    parts = [{"type": "image_url", "image_url": {"url": url_of(image)}}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    body = {"messages": messages, "max_tokens": TOKENS, "method": "ar"}
    response = vision.post("/v1/chat/completions", body)
    plain = response.json()["choices"][0]["message"]["content"]
    assert answers(image) == {plain}
    assert plain not in answers(other)
    page = open_page(vision.url)
    sync_api.expect(page.get_by_role("button", name="Image", exact=True)).to_be_visible()
    page.locator("#length").evaluate("(x, n) => { x.min = x.step = 1; x.value = n; }", TOKENS)
    if way == "dropped":
        transfer = page.evaluate_handle(TRANSFER, list(image))
        page.dispatch_event(".chat", "drop", {"dataTransfer": transfer})
    else:
        page.evaluate(PASTE, [TRANSFER, list(image)])
    sync_api.expect(page.locator("#images img")).to_have_count(1)
    ask(page, QUESTION)
    assert page.locator(".assistant .tokens").text_content() == plain
    sync_api.expect(page.locator(".user img")).to_be_visible()
