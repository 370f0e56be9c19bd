"""Texts of several sequences that a scheduler decodes together."""

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig


def assert_plain_texts(backend, prompts, *drafting, temperature, **options):
    """Assert that methods with budgets give plain decoding's texts, decoded two at once.

    The prompts' numbers are the seeds.
    """
    samplings = [SamplingConfig(temperature=temperature, seed=i) for i in range(len(prompts))]

    def texts(method, budget):
        settings = {"method": method, "budget": budget, **options}
        configs = [DecodeConfig(sampling=x, **settings) for x in samplings]
        return decode_together(backend, prompts, configs, parallel=2)

    plain = texts("ar", 1)
    for method, budget in drafting:
        assert texts(method, budget) == plain, (method, budget)


def decode_together(backend, prompts, configs, *, parallel):
    """Return the new tokens after each prompt, decoded by its configuration."""
    requests = [
        Request(prompt_ids=prompt, config=config, tag=i)
        for i, (prompt, config) in enumerate(zip(prompts, configs, strict=True))
    ]
    tokens = [[] for _ in prompts]
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=parallel))
    for request, step in scheduler.decode(requests):
        tokens[request.tag] += step.tokens
    return tokens
