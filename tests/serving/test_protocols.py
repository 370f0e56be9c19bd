"""The scenarios that all APIs share, each through the API's own package; see `protocols`."""

from __future__ import annotations

import base64
import json
import re

import pytest

for package in ("anthropic", "ollama", "openai", "PIL.Image"):
    pytest.importorskip(package)

from failures import failing
from protocols import PROTOCOLS, Ask, having
from protocols.ollama_api import OllamaChat
from scripted_model import scripted_model
from servers import (
    Gate,
    check_error,
    request_without_a_reader,
    serving,
    slow_down,
    submitted,
    wait_until,
)
from stub_images import base64_of, picture
from tool_models import COLOUR, RESPONSE_TEMPLATE, tool_model

from treeflash.serving.errors import SERVER_FAILED
from treeflash.serving.streaming import token_name
from treeflash.text.prompt import image_part, text_part

pytestmark = pytest.mark.sample(6)

SAMPLED = {"temperature": 1.0, "seed": 3}
RED, GREEN = '{"colour": "red"}', '{"colour": "green"}'
PAINT, WASH = ({"name": name, "parameters": COLOUR} for name in ("paint", "wash"))
ANSWERS = {
    "<|hello|>": ["Hel", "lo", "!"],
    "<|thought|>": ["<think>", "Who", " is", " it?", "</think>", "It", " was", " you."],
    "<|call|>": [
        *("I", " paint."),
        *('<call>{"name": "paint", ', '"arguments": {"colour": "red"}}</call>'),
        *('\n<call>{"name": "wash", ', '"arguments": {"colour": "blue"}}</call>'),
    ],
}
CHOOSES_ANSWER = (
    "{{ tools | tojson if tools }}\n{% for m in messages %}{{ m.content }}\n{% endfor %}"
    "{% if tools %}<|call|>{% elif enable_thinking %}<|thought|>{% else %}<|hello|>{% endif %}"
)
SHOWS_ALL = (
    "{{ tools | tojson if tools }}\n"
    "{{ 'It thinks.' if enable_thinking }}\n"
    "{% for m in messages %}{{ m.role }} {{ m.tool_call_id }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %} {{ c.id }}={{ c.function | tojson }}{% endfor %}{{ '\n' }}"
    "{% endfor %}assistant: "
)
"""A template that shows what templates can read of a conversation."""

streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def apis(*capabilities):
    return pytest.mark.parametrize("api", having(*capabilities))


@pytest.fixture(scope="module")
def server(tool_server):
    return tool_server


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A server whose model thinks where it is asked to, and else calls the tools that it has."""
    template = {**RESPONSE_TEMPLATE, "start_anchor": list(ANSWERS)}
    folder = tmp_path_factory.mktemp("scripted")
    with serving(scripted_model(folder, ANSWERS, CHOOSES_ANSWER, template)) as running:
        yield running


@pytest.fixture(scope="module")
def showing(tmp_path_factory):
    """A server whose prompts show all of a conversation."""
    with serving(
        tool_model(tmp_path_factory.mktemp("showing"), chat_template=SHOWS_ALL)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def image_server(image_model):
    with serving(image_model, SAMPLED) as running:
        yield running


def in_python(model, api, ask, **options):
    """What the Python API generates."""
    options = {"max_tokens": ask.max_tokens, **SAMPLED, **options}
    if "messages" not in api.can:
        return model.generate(ask.text, raw=True, **options)
    system = [] if ask.system is None else [{"role": "system", "content": ask.system}]
    return model.generate([*system, {"role": "user", "content": ask.text}], **options)


@streams
@apis()
def test_an_answer_is_that_of_the_python_api(server, tool_pair, api, stream):
    ask = Ask(system="Be brief.") if "messages" in api.can else Ask()
    expected = in_python(tool_pair, api, ask)
    found = api.ask(server.url, ask, stream=stream)
    assert (found.text, found.reason) == (expected.text, "length")
    assert (found.prompt_tokens, found.new_tokens) == (expected.prompt_tokens, 12)
    assert (found.thinking, found.calls, found.stop_string) == ("", [], None)
    assert (len(found.pieces) > 2) == stream, "a stream comes as it is decoded"


@pytest.mark.sample(5)
@streams
@apis("stop")
def test_a_stop_string_ends_the_answer(server, tool_pair, api, stream):
    ask = Ask(max_tokens=48)
    text = in_python(tool_pair, api, ask).text
    stop = text[10:13]
    found = api.ask(server.url, Ask(max_tokens=48, stop=["\0none", stop]), stream=stream)
    assert (found.text, found.reason) == (text[: text.index(stop)], "stop")
    assert found.stop_string == (stop if "named stop" in api.can else None)


def is_first(text, i, length):
    return text.index(text[i : i + length]) == i


@pytest.mark.sample(1)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", having("named stop"))
def test_the_stop_string_that_ended_an_answer_is_named(model, serve, api, stream):
    """If two end at the same token, the one that began first ends the text."""
    letters = {model.tokenizer.encode(x)[0] for x in "abcdefghijklmnopqrstuvwxyz"}
    bias = {i: -100.0 for i in range(model.backend.vocab_size) if i not in letters}
    server = serve(defaults={"temperature": 1.0, "seed": 3, "logit_bias": bias})
    text = api.ask(server.url, Ask("Hi", max_tokens=60)).text
    i = next(i for i in range(40) if all(is_first(text, i + j, 3 - j) for j in (0, 1, 2)))
    longer, shorter, later = text[i : i + 3], text[i + 1 : i + 3], text[i + 3 : i + 15]
    for stops in ([shorter, longer], [longer, shorter], [later, longer], ["\0none", longer]):
        ask = Ask("Hi", max_tokens=60, stop=stops)
        found = api.ask(server.url, ask, stream=stream)
        assert (found.reason, found.stop_string) == ("stop", longer), stops
        assert found.text == text[:i]


@pytest.fixture(scope="module")
def ending(model):
    """A server whose model ends each answer at once."""
    with serving(model, {"logit_bias": {min(model.tokenizer.stop_token_ids): 100.0}}) as running:
        yield running


@streams
@apis()
def test_an_answer_ends_by_itself(ending, api, stream):
    found = api.ask(ending.url, Ask(max_tokens=9), stream=stream)
    assert (found.text, found.reason, found.stop_string) == ("", "stop", None)
    assert found.new_tokens == 1


@streams
@apis("log probabilities")
@pytest.mark.parametrize("top", [0, 2])
def test_log_probabilities(server, tool_pair, api, stream, top):
    expected = in_python(tool_pair, api, Ask(), log_probs=top)
    found = api.ask(server.url, Ask(log_probs=top), stream=stream).log_probs

    def name(token):
        return token_name(tool_pair.tokenizer, token)

    assert [x.token for x in found] == [name(token) for token in expected.token_ids]
    for one, other in zip(found, expected.log_probs, strict=True):
        best = {name(token): value for token, value in other.top}
        if "own token among the best" in api.can:
            best[one.token] = other.log_prob
        assert one.value == pytest.approx(other.log_prob, abs=1e-4)
        assert one.top == pytest.approx(best, abs=1e-4)


@streams
@apis("calls")
def test_calls_follow_the_text(scripted, api, stream):
    found = api.ask(scripted.url, Ask(functions=[PAINT, WASH], max_tokens=60), stream=stream)
    assert (found.text, found.thinking) == ("I paint.", "")
    calls = [(call.name, call.arguments) for call in found.calls]
    assert calls == [("paint", {"colour": "red"}), ("wash", {"colour": "blue"})]
    assert found.reason == ("calls" if "call ids" in api.can else "stop")
    if "call ids" in api.can:
        assert len({call.id for call in found.calls} - {""}) == 2


def test_calls_of_ollama_have_ids(scripted):
    """Its package drops them; a result may name its call."""
    response = scripted.post(*OllamaChat().request(Ask(functions=[PAINT, WASH], max_tokens=60)))
    ids = {call["id"] for call in response.json()["message"]["tool_calls"]}
    assert len(ids - {""}) == 2


@apis("calls")
def test_a_conversation_with_calls_goes_on(scripted, showing, api):
    """The answer is sent back as it came; the model sees each call, and the result of each."""
    functions = [PAINT, WASH]
    ask = Ask("Go.", functions=functions, max_tokens=60)
    answered = api.ask(scripted.url, ask)
    ask = Ask("Go.", functions=functions, answered=answered, results=["It is red.", "It is clean."])
    tools, _, *lines = submitted(showing, *api.request(ask)).prompt.splitlines()
    assert '"paint"' in tools
    assert '"wash"' in tools
    pattern = r'assistant : I paint\. (\S+)=(\{.*"paint".*\}) (\S+)=(\{.*"wash".*\})'
    first, call, second, other = re.fullmatch(pattern, lines[1]).groups()
    assert lines[0] == "user : Go."
    assert lines[2:] == [f"tool {first}: It is red.", f"tool {second}: It is clean.", "assistant: "]
    calls = [("paint", {"colour": "red"}), ("wash", {"colour": "blue"})]
    found = [(x["name"], x["arguments"]) for x in map(json.loads, (call, other))]
    assert found == calls
    if "call ids" in api.can:
        assert [first, second] == [call.id for call in answered.calls]


@apis("messages")
def test_the_system_message_reaches_the_model(showing, api):
    prompt = submitted(showing, *api.request(Ask(system="Be kind."))).prompt
    assert prompt.splitlines()[2:] == ["system : Be kind.", "user : Hello.", "assistant: "]


@apis("thinking")
@pytest.mark.parametrize("thinks", [None, False, True])
def test_thinking_is_turned_on_and_off(showing, api, thinks):
    prompt = submitted(showing, *api.request(Ask(thinks=thinks))).prompt
    assert ("It thinks." in prompt) == (thinks is True)


@streams
@apis("thinking")
def test_thoughts_are_told_apart(scripted, api, stream):
    found = api.ask(scripted.url, Ask(thinks=True, max_tokens=60), stream=stream)
    assert (found.thinking, found.text) == ("Who is it?", "It was you.")
    assert found.reason == "stop"
    plain = api.ask(scripted.url, Ask(thinks=False), stream=stream)
    assert (plain.thinking, plain.text) == ("", "Hello!")


@streams
@apis("thinking")
def test_a_thought_that_is_cut_off(server, tool_pair, api, stream):
    expected = in_python(tool_pair, api, Ask(), template_args={"enable_thinking": True})
    found = api.ask(server.url, Ask(thinks=True), stream=stream)
    assert (found.thinking, found.text, found.reason) == (expected.text, "", "length")


@pytest.mark.sample(2)
@apis("thinking")
def test_a_model_that_does_not_reason(tmp_path, api):
    model = tool_model(tmp_path, chat_template="{{ messages[0].content }}")
    with serving(model) as running:
        assert submitted(running, *api.request(Ask(thinks=False))).prompt == "Hello."
        response = running.post(*api.request(Ask(thinks=True)))
    check_error(response, 400, "does not support reasoning")


@pytest.mark.sample(5)
@apis("images")
@pytest.mark.parametrize("form", ["one line", "lines"])
def test_images(image_server, image_model, api, form):
    """The command base64 breaks its output into lines."""
    for images in ([picture(1)], [picture(2), picture(1)]):
        parts = [*map(image_part, images), text_part("?")]
        expected = image_model.generate(
            [{"role": "user", "content": parts}], method="ar", max_tokens=12, **SAMPLED
        )
        texts = [
            base64_of(image)
            if form == "one line"
            else base64.encodebytes(image).decode().replace("\n", "\r\n ")
            for image in images
        ]
        found = api.ask(image_server.url, Ask("?", images=texts))
        assert (found.text, found.prompt_tokens) == (expected.text, expected.prompt_tokens)


@apis("images")
def test_a_target_without_images_is_named(server, api):
    response = server.post(*api.request(Ask(images=[base64_of(picture(1))])))
    says = "target takes no images: the backend does not run images of its model type"
    assert check_error(response, 400) == says


@apis("continuation")
def test_a_begun_answer_is_continued(server, tool_pair, api):
    """The prompt ends with the assistant's text, and the answer is what follows."""
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "The capital is"},
    ]
    start = tool_pair.tokenizer.transformers.apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    assert start.endswith("<|start|>assistant: The capital is")
    found = api.ask(server.url, Ask(begun="The capital is"))
    expected = tool_pair.generate(start, raw=True, max_tokens=12, **SAMPLED)
    assert found.text == expected.text


@apis("continuation")
def test_a_begun_answer_may_have_a_broken_call(server, api):
    """An answer does not run on after an error."""
    api.ask(server.url, Ask(begun='I paint. <call>{"name": </call>', max_tokens=5))
    assert not server.engine.scheduler.busy


@pytest.mark.sample(1)
@apis()
def test_the_default_length_of_an_answer(server, serve, api):
    """2,048 tokens, or as many as the command's option allows; never beyond the context."""
    ask = Ask("A", max_tokens=None if "free length" in api.can else 150)
    for running, default in ((serve(), 2048), (serve(defaults={"max_tokens": 7}), 7)):
        config = submitted(running, *api.request(ask)).answer.config
        assert config.max_tokens == (default if "free length" in api.can else 150)
        assert config.sampling.temperature == 0.0, "answers are greedy"


def call(name, arguments):
    return f'<call>{{"name": "{name}", "arguments": {arguments}}}</call>'


@pytest.fixture
def allowed(server):
    """Make the answer to a question that a server would decode."""
    return lambda api, **fields: submitted(server, *api.request(Ask(**fields)))


@apis("choice")
def test_the_modes_of_tool_choice(allowed, api):
    """Without a call, with any call, with a call of one function."""
    both = [PAINT, WASH]
    answer = allowed(api, functions=both, choice="none")
    assert "paint" not in answer.prompt
    assert answer.accepts("Hello.")
    for choice in (None, "auto"):
        answer = allowed(api, functions=both, choice=choice)
        assert "paint" in answer.prompt
        assert "wash" in answer.prompt
        assert answer.accepts("Hello.")
        assert answer.accepts(call("paint", GREEN)), "nothing is enforced"
    answer = allowed(api, functions=both, choice="required")
    assert "paint" in answer.prompt
    assert "wash" in answer.prompt
    assert answer.accepts(call("paint", RED))
    assert answer.accepts(call("wash", RED))
    for text in ("", "Hello.", call("paint", GREEN), call("paint", "{}"), call("other", RED)):
        assert not answer.accepts(text), text
    assert not answer.accepts("Hello." + call("paint", RED))
    answer = allowed(api, functions=both, choice="wash")
    assert "wash" in answer.prompt
    assert answer.accepts(call("wash", RED))
    for text in ("Hello.", call("wash", GREEN), call("paint", RED)):
        assert not answer.accepts(text), text


@apis("choice")
@pytest.mark.parametrize("choice", ["required", "wash"])
def test_one_enforced_call_or_several(allowed, api, choice):
    one, two = call("wash", RED), call("wash", RED) * 2
    answer = allowed(api, functions=[WASH], choice=choice)
    assert answer.accepts(one)
    assert answer.accepts(two) == (choice == "required"), "a named function is called once"
    answer = allowed(api, functions=[WASH], choice=choice, parallel=False)
    assert answer.accepts(one)
    assert not answer.accepts(two)


@streams
@apis("choice")
@pytest.mark.parametrize("tokens", [3, 12, 20])
def test_an_enforced_call_that_is_cut_off_is_not_content(server, api, stream, tokens):
    asked = Ask(functions=[PAINT, WASH], choice="required", max_tokens=tokens)
    found = api.ask(server.url, asked, stream=stream)
    assert (found.text, found.calls, found.reason) == ("", [], "length")


@streams
@apis("choice")
@pytest.mark.parametrize("choice", ["required", "wash"])
def test_an_enforced_call(server, api, stream, choice):
    """A model of random weights writes one."""
    asked = Ask(functions=[PAINT, WASH], choice=choice, parallel=False, max_tokens=400)
    found = api.ask(server.url, asked, stream=stream)
    (made,) = found.calls
    assert (found.text, found.thinking, found.reason) == ("", "", "calls")
    assert made.name in ("wash", "paint")[: 1 if choice == "wash" else 2]
    assert made.arguments["colour"] in ("red", "blue")


@apis("calls")
def test_strict_functions_are_enforced_in_free_text(allowed, api):
    """Text is free until it begins a call; the arguments of a strict function follow its schema."""
    for choice in (None, "auto") if "choice" in api.can else (None,):
        answer = allowed(api, functions=[{**PAINT, "strict": True}, WASH], choice=choice)
        for text in ("Hello.", call("paint", RED), f"I paint. {call('paint', RED)} Done."):
            assert answer.accepts(text), text
        assert answer.accepts(call("wash", GREEN)), "it is not strict"
        for wrong in (GREEN, "{}", "[]", '{"colour": "red", "more": 1}', '{"colour": 1}'):
            assert not answer.accepts(call("paint", wrong)), wrong
            assert not answer.accepts(f"I paint. {call('paint', wrong)}"), wrong
        assert not answer.accepts(call("other", RED))
        answer = allowed(api, functions=[{**PAINT, "strict": False}], choice=choice)
        assert answer.accepts(call("paint", GREEN))


@apis("choice")
@pytest.mark.parametrize("choice", [None, "auto"])
def test_one_call_of_a_strict_function(allowed, api, choice):
    functions = [{**PAINT, "strict": True}, WASH]
    answer = allowed(api, functions=functions, choice=choice, parallel=False)
    assert answer.accepts(call("paint", RED))
    assert answer.accepts(f"I paint. {call('paint', RED)} Done.")
    for text in (call("paint", RED) * 2, call("wash", RED) + " and " + call("paint", GREEN)):
        assert not answer.accepts(text), text


@apis("schema")
def test_schemas_are_enforced(allowed, api):
    answer = allowed(api, schema=COLOUR)
    assert answer.accepts(RED)
    for text in (GREEN, "{}", "Hello.", "", RED + "x", "x" + RED):
        assert not answer.accepts(text), text


NO_SCHEMA = {"type": "object", "properties": {"a": {"type": "colour"}}}


@apis("schema")
def test_what_is_no_schema_is_refused(server, api):
    response = server.post(*api.request(Ask(schema=NO_SCHEMA)))
    param = "text" if api.path == "/v1/responses" else "response_format"
    check_error(response, 400, "invalid grammar: ", param=param)


@apis("calls")
def test_what_is_no_schema_of_a_function_is_refused(server, api):
    function = {"name": "paint", "parameters": NO_SCHEMA}
    response = server.post(*api.request(Ask(functions=[function | {"strict": True}])))
    check_error(response, 400, "invalid grammar: ", param="tools")
    if "choice" in api.can:
        response = server.post(*api.request(Ask(functions=[function], choice="required")))
        check_error(response, 400, "invalid grammar: ", param="tool_choice")


@apis("schema")
def test_white_space_between_json_tokens_is_bounded(allowed, api):
    accepts = allowed(api, schema=COLOUR).accepts
    for space in ("", " ", "\n", "\n" + " " * 20):
        assert accepts(RED.replace(" ", space)), repr(space)
    for space in ("  ", "\n" + " " * 21, "\n\n", "\t\t"):
        assert not accepts(RED.replace(" ", space)), repr(space)
    own = {**COLOUR, "x-guidance": {"whitespace_pattern": " {0,5}"}}
    accepts = allowed(api, schema=own).accepts
    assert accepts(RED.replace(" ", " " * 5))
    assert not accepts(RED.replace(" ", "\n"))


@streams
@apis("schema")
def test_an_answer_of_a_schema(server, api, stream):
    found = api.ask(server.url, Ask(schema=COLOUR, max_tokens=200), stream=stream)
    assert json.loads(found.text)["colour"] in ("red", "blue")
    assert found.reason == "stop"


@apis("schema", "thinking")
def test_schemas_apply_after_the_reasoning(allowed, api):
    answer = allowed(api, schema=COLOUR, thinks=True)
    assert answer.prompt.endswith("<think>")
    assert answer.accepts(f"Any thought, {GREEN}.</think>{RED}")
    assert not answer.accepts(f"A thought.</think>{GREEN}")
    assert not answer.accepts(RED)


@apis("choice", "schema")
@pytest.mark.parametrize("choice", ["required", "wash"])
def test_a_required_call_has_no_content_to_constrain(allowed, api, choice):
    """`Mode.RESPONSES_TOOLS` of instructor asks for both."""
    answer = allowed(api, schema=COLOUR, functions=[WASH], choice=choice)
    assert answer.accepts(call("wash", RED))
    assert not answer.accepts(RED)


@streams
@apis()
def test_another_model(server, api, stream):
    response = server.post(*api.request(Ask(model="gpt-5"), stream=stream))
    code = {"param": "model", "code": "model_not_found", "type": "not_found_error"}
    says = "not found" if api.path.startswith("/api/") else "does not exist"
    message = check_error(response, 404, f"model 'gpt-5' {says}; ", **code)
    assert message.endswith("; this server has tiny")


@streams
@apis()
def test_an_unknown_field(server, api, stream):
    path, body = api.request(Ask(), stream=stream)
    check_error(server.post(path, body | {"frobnicate": 1}), 400, "frobnicate is not supported")


@streams
@apis()
def test_a_prompt_that_is_too_long(server, api, stream):
    """An error before a stream has a status, which the package raises.

    Agents find these words, and compact the conversation.
    """
    with pytest.raises(api.failure, match=r"\d+ tokens"):
        api.ask(server.url, Ask("x" * 5000), stream=stream)
    response = server.post(*api.request(Ask("x" * 5000), stream=stream))
    fields = {"type": "invalid_request_error", "code": "context_length_exceeded"}
    message = check_error(response, 400, **fields)
    if api.path == "/v1/messages":
        assert re.fullmatch(r"prompt is too long: 5\d{3} tokens > 4096 maximum", message)
    else:
        assert message.startswith("This model's maximum context length is 4096 tokens. ")


@apis("calls")
def test_two_functions_of_a_name(server, api):
    response = server.post(*api.request(Ask(functions=[PAINT, PAINT])))
    check_error(response, 400, "paint", param="tools")


@apis("choice")
@pytest.mark.parametrize(
    ("functions", "choice"), [([], "required"), ([PAINT], "missing")], ids=["none", "another"]
)
def test_a_choice_of_no_function(server, api, functions, choice):
    response = server.post(*api.request(Ask(functions=functions, choice=choice)))
    check_error(response, 400, "tool_choice", param="tool_choice")


@pytest.fixture(scope="module")
def without_tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    with serving(tool_model(folder, response_template=None)) as running:
        yield running


@apis("calls")
def test_a_model_without_tools_refuses_them(without_tools, api):
    response = without_tools.post(*api.request(Ask(functions=[PAINT])))
    check_error(response, 400, "not supported with this model")


@streams
@apis()
def test_a_failure_is_told(server, api, stream):
    """It is the last that a stream says."""
    with failing(server.engine.scheduler, "step", ZeroDivisionError):
        with pytest.raises(api.failure):
            api.ask(server.url, Ask(), stream=stream)
        response = server.post(*api.request(Ask(), stream=stream))
    assert api.told(response, 500) == SERVER_FAILED
    assert server.engine.unfinished == 0


@pytest.mark.sample(2)
@streams
@apis()
def test_the_time_limit_is_for_the_whole_answer(model, api, stream):
    """A token at times does not put it off."""
    defaults = {"method": "ar", "stop_token_ids": ()}
    with serving(model, defaults, timeout=0.4, keep_alive=0.05) as server:
        slow_down(server, 0.02)
        response = server.post(*api.request(Ask("A", max_tokens=150), stream=stream))
        assert api.told(response, 504) == "the answer took longer than this server allows"
        wait_until(lambda: server.engine.unfinished == 0)
        assert not server.engine.scheduler.busy


@pytest.mark.sample(4)
@streams
@apis()
def test_a_disconnect_ends_the_answer_within_one_iteration(serve, caplog, api, stream):
    server = serve(defaults={"method": "ar", "stop_token_ids": ()})
    path, body = api.request(Ask("A", max_tokens=400), stream=stream)
    if stream:
        asked = server.client.stream("POST", path, json=body)
    else:
        asked = request_without_a_reader(server, path, body)
    with caplog.at_level("INFO", "treeflash.serving"), Gate(server.engine) as gate:
        with asked:
            gate.allow(2)
            assert server.engine.scheduler.running == 1
        # The log of a request names answers that were dropped, after the engine was told.
        wait_until(lambda: "unfinished" in caplog.text)
        gate.open()
        wait_until(lambda: server.engine.unfinished == 0)
        assert gate.arrivals == 3
        assert not server.engine.scheduler.busy


def test_each_api_has_an_adapter(server):
    """A path that takes questions is in the table of APIs."""
    paths = server.client.get("/openapi.json").json()["paths"]
    others = {"/v1/messages/count_tokens", "/tokenize", "/detokenize", "/api/show"}
    assert {path for path, methods in paths.items() if "post" in methods} - others == {
        api.path for api in PROTOCOLS
    }
