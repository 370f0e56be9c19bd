"""Texts of several sequences that a scheduler decodes together."""

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig


def scheduled_texts(backend, prompts, *, temperature, **options):
    """The new tokens after each prompt, two at once, with the prompts' numbers as seeds."""
    requests = [
        Request(
            prompt_ids=prompt,
            config=DecodeConfig(
                sampling=SamplingConfig(temperature=temperature, seed=i), **options
            ),
            tag=i,
        )
        for i, prompt in enumerate(prompts)
    ]
    tokens = [[] for _ in prompts]
    for request, step in Scheduler(backend, SchedulerConfig(max_parallel=2)).decode(requests):
        tokens[request.tag] += step.tokens
    return tokens
