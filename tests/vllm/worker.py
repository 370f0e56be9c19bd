"""Decodes greedily with vLLM in a process of its own: a JSON job on stdin, JSON on the last line.

A job has `target`, `prompts` (token ids), `max_tokens`, and perhaps `drafter` with `drafts`, the
number of tokens that are drafted in each pass. The result has, for each prompt, the lists of tokens
that the passes added: a pass that accepts n drafts adds n + 1 tokens.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams, TokensPrompt


def main() -> None:
    """Run the job; all prompts are decoded together."""
    job: dict[str, Any] = json.load(sys.stdin)
    speculative = None
    if drafter := job.get("drafter"):
        speculative = {
            "method": "dflash",
            "model": drafter,
            "num_speculative_tokens": job["drafts"],
        }
    engine = LLM(
        model=job["target"],
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=256,
        max_num_seqs=4,
        enable_prefix_caching=False,
        speculative_config=speculative,
    ).llm_engine
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    for i, prompt in enumerate(job["prompts"]):
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
    passes: list[list[list[int]]] = [[] for _ in job["prompts"]]
    while engine.has_unfinished_requests():
        for output in engine.step():
            known = passes[int(output.request_id.partition("-")[0])]
            tokens = list(output.outputs[0].token_ids)
            if new := tokens[sum(map(len, known)) :]:
                known.append(new)
    print(json.dumps(passes))


if __name__ == "__main__":
    main()
