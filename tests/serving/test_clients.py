"""The clients that people use. The page of tools and structured output has its own tests."""

from __future__ import annotations

import os

import pytest

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "Name a river."}]
OPTIONS = {"max_tokens": 12, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def url(server):
    return f"{server.url}/v1"


@pytest.fixture(scope="module")
def expected(model):
    return [model.generate(MESSAGES, **{**OPTIONS, "seed": 3 + i}) for i in range(2)]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


class TestOpenAI:
    def test_chat(self, client, expected):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1, **OPTIONS
        )
        assert [choice.message.content for choice in answer.choices] == [x.text for x in expected]
        assert answer.choices[0].finish_reason == expected[0].finish_reason
        assert answer.usage.prompt_tokens == expected[0].prompt_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens >= 0
        found = answer.choices[0].logprobs.content
        assert len(found) == len(expected[0].token_ids)
        assert len(found[0].top_logprobs) == 1

    def test_helper_for_streams(self, client, expected):
        stop = expected[0].text[2]  # it refuses answers that were cut off by their length
        with client.chat.completions.stream(
            model="tiny", messages=MESSAGES, stop=stop, **OPTIONS
        ) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == expected[0].text.partition(stop)[0]

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "treeflash"

    def test_errors(self, client):
        def create(**fields):
            client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})

        with pytest.raises(openai.BadRequestError, match="top_p"):
            create(top_p=7)
        with pytest.raises(openai.NotFoundError, match="this server has tiny"):
            create(model="other")
        with pytest.raises(openai.BadRequestError, match="web_search_options is not supported"):
            create(web_search_options={})

    def test_keys(self, serve):
        url = serve(api_keys=("secret",)).url
        for key in ("wrong", "secret"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                if key == "secret":
                    assert client.models.list().data
                else:
                    with pytest.raises(openai.AuthenticationError, match="API key"):
                        client.models.list()


@pytest.fixture(scope="module")
def complete(url):
    # Or it fetches prices in the background, and reports failures amid the output of other tests.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    return lambda **fields: litellm.completion(
        **{
            "model": "openai/tiny",
            "messages": MESSAGES,
            "api_base": url,
            "api_key": "none",
            "num_retries": 0,
            **OPTIONS,
            **fields,
        }
    )


# Half a minute of imports. It sends what the other clients send.
@pytest.mark.nightly
class TestLiteLLM:
    def test_chat(self, complete, expected):
        answer = complete(n=2)
        assert [choice.message.content for choice in answer.choices] == [x.text for x in expected]

    def test_stream(self, complete, expected):
        chunks = list(complete(stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected[0].text

    def test_errors(self, complete):
        import litellm

        with pytest.raises(litellm.BadRequestError, match="max_tokens"):
            complete(max_tokens=-1)

    @pytest.mark.parametrize("provider", ["ollama", "ollama_chat"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_providers_of_ollama(self, complete, server, model, provider, stream):
        """They send their bodies without a content type."""
        prompt = MESSAGES if provider == "ollama_chat" else "### User:\nName a river.\n\n"
        expected = model.generate(prompt, **OPTIONS).text
        answer = complete(model=f"{provider}/tiny", api_base=server.url, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        assert text == expected


@pytest.fixture(scope="module")
def chat(url):
    package = pytest.importorskip("langchain_openai")
    return package.ChatOpenAI(model="tiny", base_url=url, api_key="none", max_retries=0, **OPTIONS)


# It wraps the client of OpenAI, and takes long to import.
@pytest.mark.nightly
class TestLangChain:
    def test_chat(self, chat, expected):
        answer = chat.invoke("Name a river.")
        assert answer.content == expected[0].text
        assert answer.usage_metadata["output_tokens"] == len(expected[0].token_ids)

    def test_stream(self, chat, expected):
        assert "".join(chunk.content for chunk in chat.stream("Name a river.")) == expected[0].text

    def test_log_probs(self, chat, expected):
        answer = chat.bind(logprobs=True).invoke("Name a river.")
        found = answer.response_metadata["logprobs"]["content"]
        assert len(found) == len(expected[0].token_ids)
