"""A target with a vision tower behind the server, asked by the clients of every protocol."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers
from byte_tokens import save_tokenizer
from servers import serving
from stub_images import StubProcessor, base64_of, picture

for package in ("anthropic", "ollama", "openai"):
    pytest.importorskip(package)

import treeflash_cuda.images as cuda_images
from image_models import RandomProcessor, random_model
from protocols import PROTOCOLS, Ask, having
from treeflash_cuda.backend import load

from treeflash.config import LoadConfig
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import image_part, text_part
from treeflash.text.tokenizer import Tokenizer

pytestmark = pytest.mark.sample(1)

FAMILY = "gemma3"
TOKENS, QUESTION = 12, "?"
DEFAULTS = {"method": "suffix", "temperature": 0.0}


class ByteProcessor(RandomProcessor):
    """A processor whose text has a token for each byte."""

    chat_template = StubProcessor.chat_template
    encode = None  # text to token ids

    def __call__(self, text, images, **settings):
        pieces = ["".join(map(chr, self.encode(x))) for x in text[0].split(self.image_token)]
        return super().__call__([self.image_token.join(pieces)], images, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("vision")
    random_model(FAMILY).save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    processor = ByteProcessor(FAMILY)
    processor.encode = tokenizer.encode_continuation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_images, "read_processor", lambda _: processor)
        backend = load(folder, None, LoadConfig(device="cpu", dtype="float32"))
    assert not isinstance(backend.images, str), backend.images
    return LanguageModel(backend, tokenizer, folder, suffix=True)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, DEFAULTS) as running:
        yield running


@pytest.fixture(scope="module")
def expected(model):
    """The text of plain decoding, by the seed of the image."""
    return [
        model.generate(
            [{"role": "user", "content": [image_part(picture(seed)), text_part(QUESTION)]}],
            method="ar",
            max_tokens=TOKENS,
        ).text
        for seed in range(10)
    ]


def text_of(api, server, seed):
    ask = Ask(QUESTION, images=[base64_of(picture(seed))], max_tokens=TOKENS)
    return api.ask(server.url, ask).text


@pytest.mark.parametrize("api", having("images"))
def test_every_client_gets_the_text_of_plain_decoding(server, expected, api):
    assert len(set(expected)) >= 8  # of ten images
    assert [text_of(api, server, seed) for seed in (0, 1, 0)] == [
        expected[seed] for seed in (0, 1, 0)
    ]


def test_ten_clients_with_different_images(server, expected):
    apis = [api for api in PROTOCOLS if "images" in api.can]
    with ThreadPoolExecutor(10) as pool:
        answers = pool.map(lambda i: text_of(apis[i % len(apis)], server, i), range(10))
    assert list(answers) == expected


def test_drafts_and_the_cache_leave_the_text_as_it_is(model, expected):
    prompt = [{"role": "user", "content": [image_part(picture(0)), text_part(QUESTION)]}]
    for options in ({"method": "suffix", "budget": 8}, {"method": "suffix", "budget": "auto"}):
        assert model.generate(prompt, max_tokens=TOKENS, **options).text == expected[0]
