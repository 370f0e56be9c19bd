"""Tiny random models with vision towers, as transformers runs them and as an engine does."""

from dataclasses import replace
from functools import cached_property

from image_models import picture, random_model, random_processors, reference

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.verify_costs import SIZES, VerifyCosts

TOKENS = 10
LIMITS = SchedulerConfig(snapshot_interval=4)
TEXTS = (
    ("ab<image>cd", [picture(1)]),
    ("<image>ef<image>gh", [picture(1), picture(2, 24, 16)]),
    ("ab<image>cd", [picture(3)]),
)


class Vision:
    """A model of transformers, and the same model as an engine's target."""

    def __init__(self, engine, family, folder, **settings):
        self.engine, self.family, self.folder = engine, family, folder
        self.model = random_model(family)
        engine.save_with_images(family, self.model, folder)
        self.backend = self.load(**settings)
        assert not isinstance(self.backend.images, str), self.backend.images
        self.prompts = [self.encode(*text) for text in TEXTS]

    def load(self, drafter=None, load=None, **settings):
        """Load the target with the engine's settings, or by a function."""
        with random_processors(self.family, self.engine.images):
            return (load or self.engine.load)(self.folder, drafter, **settings)

    def encode(self, text, pictures=()):
        if not pictures:
            return [1, *map(ord, text)], None
        return self.backend.images.encode(text, pictures)

    def reference(self, prompt, tokens=TOKENS):
        return reference(self.model, *prompt, tokens)

    @cached_property
    def expected(self):
        """The tokens after `prompts`."""
        return [self.reference(prompt) for prompt in self.prompts]

    def decode(self, prompts, size=1000, cache=None, method="suffix", tokens=TOKENS, **sampling):
        """The tokens after prompts, decoded together in chunks of a size."""
        config = replace(LIMITS, prefill_chunk=size, lone_prefill_chunk=size)
        scheduler = steady_scheduler(self.backend, config, cache)
        texts = {request(prompt, method, tokens, **sampling): [] for prompt in prompts}
        for one, step in scheduler.decode(texts):
            texts[one] += step.tokens
        return list(texts.values())

    def decode_alone(self, prompt, cache):
        """The steps after a prompt."""
        scheduler = steady_scheduler(self.backend, cache=cache)
        return [step for _, step in scheduler.decode([request(prompt)])]


def steady_scheduler(backend, config=LIMITS, cache=None):
    """A scheduler that need not time forward passes for its adaptive budget."""
    budgets = AdaptiveBudgets(VerifyCosts({size: 1 + 0.01 * size for size in SIZES}))
    return Scheduler(backend, config, budgets=budgets, prefix_cache=cache)


def request(prompt, method="suffix", tokens=TOKENS, **sampling):
    decode = DecodeConfig(method=method, max_tokens=tokens, sampling=SamplingConfig(**sampling))
    return Request(prompt_ids=prompt[0], images=prompt[1], config=decode)
