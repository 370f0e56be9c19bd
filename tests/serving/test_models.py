"""Several models behind one address: loaded when they are named, put away when memory is short."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import httpx
import pytest
from asgi import ask_async
from bodies import CHAT, ollama
from failures import failing
from protocols import PROTOCOLS, Ask
from recordings import recording
from scripted_model import reference_model
from servers import MAX_POSITIONS, PATIENCE, Gate, check_error, serving_pool, wait_until
from several_models import BUNDLED, NAMES, Loads, load_alone, make_pool

from treeflash.decoding.disk_cache import BLOCK_POSITIONS
from treeflash.errors import CheckpointError
from treeflash.language_model import LanguageModel
from treeflash.serving.application import application

pytestmark = pytest.mark.sample(1)

TOKENS = 12
apis = pytest.mark.parametrize("api", PROTOCOLS, ids=lambda api: type(api).__name__)
streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def alone(pairs) -> dict[str, LanguageModel]:
    """The same models, loaded by the Python API."""
    return {name: reference_model(*folders) for name, folders in pairs.items()}


def question(model, content="Hello.", **fields):
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS, **fields}


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def answer_of(model, content="Hello.", **options):
    messages = [{"role": "user", "content": content}]
    return model.generate(messages, max_tokens=TOKENS, **options).text


def in_memory(server) -> set[str]:
    return {model["name"] for model in server.client.get("/api/ps").json()["models"]}


def counted(server, name) -> Counter[str]:
    """The values of a metric by model and, if it has one, reason."""
    prefix, found = f"treeflash:{name}", Counter()
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith(f"{prefix}{{"):
            labels, value = line.removeprefix(prefix).rsplit(" ", 1)
            model = labels.partition('model="')[2].partition('"')[0]
            found[model] += int(float(value))
    return found


def test_models_are_loaded_when_they_are_named(serve_models, loads, alone):
    server = serve_models()
    assert in_memory(server) == set()
    for name in ("two", "TWO", "org/Three"):
        spelled = next(x for x in NAMES if x.lower() == name.lower())
        response = server.post(CHAT, question(name))
        assert text_of(response) == answer_of(alone[spelled])
        assert response.json()["model"] == spelled
    assert loads.counts == {"two": 1, "org/three": 1}
    assert in_memory(server) == {"two", "org/three"}
    assert counted(server, "model_loads_total") == {"One": 0, "two": 1, "org/three": 1}
    assert counted(server, "model_loaded") == {"One": 0, "two": 1, "org/three": 1}
    assert counted(server, "generation_tokens_total") == {
        "One": 0, "two": 2 * TOKENS, "org/three": TOKENS,
    }  # fmt: skip
    unnamed = {key: value for key, value in question("").items() if key != "model"}
    assert text_of(server.post(CHAT, unnamed)) == answer_of(alone["One"])


@pytest.mark.parametrize("limit", ["models", "memory"])
def test_random_requests_while_memory_holds_two_models(serve_models, loads, alone, limit):
    """Over all APIs, some of them cancelled: every text is the Python API's, and none is lost."""
    server = serve_models(**({"max_models": 2} if limit == "models" else {}))
    loads.capacity = 2 if limit == "memory" else None
    ask_at_random(server, loads, alone, count=4)
    gc.collect()
    assert loads.living() <= 2


# Half a minute, for the weights of a real model; the test above has more loads of small ones.
@pytest.mark.nightly
def test_random_requests_with_the_default_pair(pairs, smollm2, alone):
    pytest.importorskip("treeflash_cuda")
    every = {**pairs, BUNDLED: (smollm2, smollm2)}
    loads = Loads(every)
    with serving_pool(make_pool(every, loads, max_models=2)) as server:
        ask_at_random(server, loads, {**alone, BUNDLED: load_alone(BUNDLED, every)}, count=25)


def ask_at_random(server, loads, alone, count):
    """Send so many requests from each of 8 clients, and compare the answers with the models'."""
    texts = {(name, True): answer_of(model) for name, model in alone.items()}
    for name, model in alone.items():
        texts[name, False] = model.generate(Ask.text, raw=True, max_tokens=TOKENS).text
    answered: Counter[str] = Counter()

    def client(seed):
        rng = random.Random(seed)
        for _ in range(count):
            name, api = rng.choice([*alone]), rng.choice(PROTOCOLS)
            asked = Ask(model=name, max_tokens=TOKENS, thinks=None)
            if rng.random() < 0.2:
                leave(server.url, api, asked, rng)
                continue
            answer = api.ask(server.url, asked, stream=rng.random() < 0.5)
            expected = texts[name, "messages" in api.can or api.path == "/api/generate"]
            assert answer.thinking + answer.text == expected, (name, api.path)
            answered[name] += 1

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(client, range(8)))
    assert answered.total() > 5 * count
    wait_until(lambda: server.pool.unfinished == 0)
    assert counted(server, "model_loads_total") == loads.counts
    put_away = counted(server, "model_unloads_total")
    assert put_away.total() == loads.counts.total() - len(in_memory(server)) > 3
    assert len(in_memory(server)) <= 2
    assert sum(counted(server, "num_requests_running").values()) == 0


def leave(url, api, asked, rng):
    """Send a request and leave, perhaps while its model is loaded, perhaps amid its answer."""
    stream = rng.random() < 0.5
    body = api.body(asked) | {"stream": stream}
    timeout = httpx.Timeout(PATIENCE, read=rng.uniform(0.001, 0.1))
    with httpx.Client(timeout=timeout) as client:
        try:
            with client.stream("POST", url + api.path, json=body) as response:
                next(response.iter_raw(), None)
        except httpx.TimeoutException:
            pass


def test_a_load_delays_its_own_requests_alone(serve_models, loads, alone):
    server = serve_models()
    server.post(CHAT, question("One"))
    loads.gates["two"] = threading.Event()
    with ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(server.post, CHAT, question("two")) for _ in range(2)]
        wait_until(lambda: loads.begun["two"])
        for stream in (False, True):
            assert server.post(CHAT, question("One", stream=stream)).status_code == 200
        assert not any(x.done() for x in waiting)
        loads.gates["two"].set()
        assert [text_of(x.result()) for x in waiting] == 2 * [answer_of(alone["two"])]
    assert loads.counts["two"] == 1


def test_a_model_is_not_put_away_while_it_answers(serve_models, loads, alone):
    """And a stream of requests for it does not keep another one waiting for ever."""
    server = serve_models(max_models=1)
    server.post(CHAT, question("One"))
    with Gate(server.engine) as gate, ThreadPoolExecutor(4) as clients:
        running = clients.submit(server.post, CHAT, question("One", stream=True))
        gate.allow(2)
        other = clients.submit(server.post, CHAT, question("two"))
        (stay,) = server.pool.in_memory
        wait_until(lambda: stay.undecided is not None)
        later = clients.submit(server.post, CHAT, question("One"))
        assert loads.counts == {"One": 1}
        gate.open()
        assert running.result().text.endswith("data: [DONE]\n\n")
        assert text_of(other.result()) == answer_of(alone["two"])
        assert text_of(later.result()) == answer_of(alone["One"])
    assert loads.counts == {"One": 2, "two": 1}


def test_a_model_stays_if_the_client_of_the_next_one_leaves(serve_models, loads):
    server = serve_models(max_models=1)
    server.post(CHAT, question("One"))
    with Gate(server.engine) as gate, ThreadPoolExecutor(1) as clients:
        running = clients.submit(server.post, CHAT, question("One", stream=True))
        gate.allow(2)
        (stay,) = server.pool.in_memory
        with pytest.raises(httpx.TimeoutException):
            server.client.post(server.url + CHAT, json=question("two"), timeout=0.2)
        wait_until(lambda: not server.pool.changing.locked())
        assert stay.undecided is None, "it takes new requests at once"
        gate.open()
        assert running.result().text.endswith("data: [DONE]\n\n")
    server.post(CHAT, question("One"))
    assert loads.counts == {"One": 1}
    assert counted(server, "model_unloads_total").total() == 0


def test_a_model_leaves_after_its_time(serve_models, loads, alone):
    server = serve_models(unload_after=0.05)
    for _ in range(2):
        assert text_of(server.post(CHAT, question("One"))) == answer_of(alone["One"])
        wait_until(lambda: in_memory(server) == set())
    assert loads.counts["One"] == 2
    assert counted(server, "model_unloads_total") == {"One": 2}
    gc.collect()
    assert loads.living() == 0
    server.post(*ollama("generate", model="One", keep_alive=-1))
    short = {"options": {"num_predict": TOKENS}, "stream": False, "keep_alive": 0.01}
    body = ollama("generate", model="One", prompt="A", **short)
    with Gate(server.engine) as gate, ThreadPoolExecutor(1) as clients:
        running = clients.submit(server.post, *body)
        gate.allow(1)
        (stay,) = server.pool.in_memory
        assert (stay.keep_alive, stay.ends) == (0.01, None), "its time runs while it answers"
        gate.open()
        assert running.result().status_code == 200
    wait_until(lambda: in_memory(server) == set())


@apis
def test_a_load_that_fails_is_an_error_of_its_requests(serve_models, loads, alone, api):
    server = serve_models()
    server.post(CHAT, question("One"))
    loads.errors["two"] = [
        CheckpointError("two has no config.json\nand more"),
        KeyError("a fault"),
        MemoryError("out of memory"),
        KeyboardInterrupt(),
    ]
    expected = [
        (500, "the model two cannot be loaded: two has no config.json"),
        (500, "the model two cannot be loaded: the server's log has the reason"),
        (503, "the device has no memory for the model two beside the models that are in use"),
        (500, "the model two cannot be loaded: the server's log has the reason"),
    ]
    asked = Ask(model="two", max_tokens=TOKENS)
    for status, message in expected:
        if status == 503:  # nothing is left that could be put away
            loads.errors["two"].insert(0, MemoryError("out of memory"))
        told = check_error(server.post(api.path, api.body(asked)), status)
        assert told.partition(";")[0] == message
        assert text_of(server.post(CHAT, question("One"))) == answer_of(alone["One"])
    assert api.ask(server.url, asked).reason == "length"
    assert counted(server, "model_load_failures_total")["two"] == len(expected)


@pytest.mark.sample(None)
@pytest.mark.parametrize("limit", ["models", "memory"])
def test_the_least_recently_used_model_leaves(serve_models, loads, alone, limit):
    """Where memory is short, the load is tried again, and finds the memory of that model."""
    server = serve_models(**({"max_models": 2} if limit == "models" else {}))
    loads.capacity = 2 if limit == "memory" else None
    for name in ("One", "two", "One"):
        assert text_of(server.post(CHAT, question(name))) == answer_of(alone[name])
    with recording(ThreadPoolExecutor, "submit"):  # a thread may keep what it has run for a while
        assert text_of(server.post(CHAT, question("org/three"))) == answer_of(alone["org/three"])
    assert in_memory(server) == {"One", "org/three"}
    assert counted(server, "model_load_failures_total").total() == 0


@pytest.mark.parametrize(
    ("short", "says"),
    [
        (MemoryError("out of memory"), "device is out of memory; send"),
        (
            RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"),
            "the GPU ran out of memory in work that was under way; shorten the prompt",
        ),
    ],
    ids=["at once", "late"],
)
def test_memory_that_runs_out_amid_an_answer(serve_models, alone, short, says):
    """Its client is told to try again, an idle model leaves for it, and others go on."""
    server = serve_models()
    for name in ("two", "org/three", "One"):
        server.post(CHAT, question(name))
    other, long = server.pool.find("org/three").service.engine, {"max_tokens": 400, "seed": 1}
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(server.post, CHAT, question("org/three") | long)
        wait_until(lambda: other.unfinished)
        with failing(server.engine.model.backend.verifier, "run", short, call=1):
            check_error(server.post(CHAT, question("One")), 503, says)
        wait_until(lambda: in_memory(server) == {"One", "org/three"})
        assert running.result().status_code == 200
    assert text_of(server.post(CHAT, question("One"))) == answer_of(alone["One"])


@streams
@apis
def test_what_clients_see_when_memory_runs_out_amid_an_answer(serve_models, api, stream):
    """A stream says it last. The idle model leaves, and then there is an answer."""
    server, asked = serve_models(), Ask(model="One", max_tokens=TOKENS)
    server.post(CHAT, question("One"))
    verifier, short = server.engine.model.backend.verifier, MemoryError("out of memory")
    server.post(CHAT, question("two"))
    with failing(verifier, "run", short, call=3), pytest.raises(api.failure):
        api.ask(server.url, asked, stream=stream)
    wait_until(lambda: in_memory(server) == {"One"})
    server.post(CHAT, question("two"))
    with failing(verifier, "run", short, call=3):
        answer = server.post(api.path, api.body(asked) | {"stream": stream})
    wait_until(lambda: in_memory(server) == {"One"})
    assert api.told(answer, 503) == "the device is out of memory; send the request again"
    assert api.ask(server.url, asked, stream=stream).reason == "length"
    assert counted(server, "model_unloads_total")["two"] == 2


def test_a_client_that_leaves_while_its_model_is_loaded(pairs, loads):
    """It gets no answer; a load that nobody waits for does not begin."""
    app = application(pool := make_pool(pairs, loads))
    loads.gates["One"] = threading.Event()
    body = json.dumps(question("One")).encode()
    other = body.replace(b"One", b"two")

    async def run():
        gone = asyncio.Event()
        headers = {"Content-Type": "application/json"}
        asked = [
            asyncio.create_task(ask_async(app, "POST", CHAT, headers, [x], disconnect=gone))
            for x in (body, other)
        ]
        while not loads.begun["One"]:
            await asyncio.sleep(0.001)
        gone.set()
        answers = await asyncio.gather(*asked)
        loads.gates["One"].set()
        while pool.models[0].service is None or pool.changing.locked():
            await asyncio.sleep(0.001)
        return answers

    answers = asyncio.run(run())
    pool.close()
    assert [x.status for x in answers] == [499, 499]
    assert loads.begun == {"One": 1}


def test_all_who_wait_for_a_model_are_told_that_the_server_ends(pairs, loads):
    """Also those whose load would begin between the signal and the server's next tick."""
    app = application(pool := make_pool(pairs, loads))
    loads.gates["One"] = threading.Event()
    headers = {"Content-Type": "application/json"}
    bodies = [json.dumps(question(name)).encode() for name in ("One", "two")]

    async def run():
        asked = [asyncio.create_task(ask_async(app, "POST", CHAT, headers, [x])) for x in bodies]
        while not loads.begun["One"]:
            await asyncio.sleep(0.001)
        pool.drain()
        loads.gates["One"].set()
        while pool.models[1].stay is not None:
            await asyncio.sleep(0.001)
        pool.end_waiting()
        done, waiting = await asyncio.wait(asked, timeout=10)
        return [x.result().status for x in done], len(waiting)

    told, waiting = asyncio.run(run())
    pool.close()
    assert (told, waiting) == ([503, 503], 0)
    assert loads.begun == {"One": 1}


def test_conversations_go_on_after_the_next_load(serve_models, loads, alone, tmp_path):
    """The models share the folder of states, in which each finds its own."""
    states = tmp_path / "states"
    server = serve_models(max_models=1, prefix_cache_dir=str(states))
    prompt = "A long story. " * 25
    cached, stored = [], 0
    for name in ("One", "two", "One"):
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS}
        answer = server.post("/v1/completions", body).json()
        expected = alone[name].generate(prompt, raw=True, max_tokens=TOKENS)
        assert answer["choices"][0]["text"] == expected.text
        cached.append(answer["usage"]["prompt_tokens_details"].get("disk_cached_tokens", 0))
        if not cached[-1]:
            wait_until(lambda stored=stored: len([*states.rglob("*")]) > stored)
        stored = len([*states.rglob("*")])
    assert cached[:2] == [0, 0]
    assert cached[2] >= BLOCK_POSITIONS


@streams
@apis
def test_a_server_that_ends_while_a_model_is_loaded(serve_models, loads, api, stream):
    server = serve_models()
    loads.gates["two"] = threading.Event()
    body = api.body(Ask(model="two")) | {"stream": stream}
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(server.post, api.path, body)
        wait_until(lambda: loads.begun["two"])
        server.server.handle_exit(15, None)
        response = waiting.result()
        loads.gates["two"].set()
    assert check_error(response, 503) == "the server is shutting down"


def test_lists_of_models(serve_models, pairs):
    """They know a model's length before it is loaded, and load none."""
    server = serve_models()
    for loaded in (set(), {"two"}):
        data = server.client.get("/v1/models").json()["data"]
        assert [x["id"] for x in data] == [*NAMES]
        lengths = [MAX_POSITIONS - i for i in range(3)]
        assert [x["max_model_len"] for x in data] == lengths
        assert [x["max_input_tokens"] for x in data] == lengths
        first = data[0]
        assert server.client.get("/v1/models/One").json() == first
        assert (first["type"], first["display_name"]) == ("model", "One")  # of Anthropic's API
        assert datetime.fromisoformat(first["created_at"]).timestamp() == first["created"]
        assert server.client.get("/v1/models/org/THREE").json()["max_model_len"] == lengths[2]
        tags = server.client.get("/api/tags").json()["models"]
        assert [x["name"] for x in tags] == [*NAMES]
        assert all(x["size"] and x["details"]["family"] == "llama" for x in tags)
        shown = server.post("/api/show", {"model": "two:latest"}).json()
        assert shown["model_info"]["llama.context_length"] == lengths[1]
        assert shown["capabilities"] == ["completion", "thinking"]
        assert in_memory(server) == loaded
        server.post(CHAT, question("two"))
