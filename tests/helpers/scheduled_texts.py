"""Texts of several sequences that a scheduler decodes together."""

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig


def scheduled_texts(backend, prompts, *, temperature, **options):
    """The new tokens after each prompt, two at once, with the prompts' numbers as seeds."""
    samplings = [SamplingConfig(temperature=temperature, seed=i) for i in range(len(prompts))]
    return decode_together(
        backend, prompts, [DecodeConfig(sampling=x, **options) for x in samplings], parallel=2
    )


def decode_together(backend, prompts, configs, *, parallel):
    """The new tokens after each prompt, decoded by its configuration."""
    requests = [
        Request(prompt_ids=prompt, config=config, tag=i)
        for i, (prompt, config) in enumerate(zip(prompts, configs, strict=True))
    ]
    tokens = [[] for _ in prompts]
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=parallel))
    for request, step in scheduler.decode(requests):
        tokens[request.tag] += step.tokens
    return tokens
