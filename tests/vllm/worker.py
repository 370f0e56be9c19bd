"""Runs vLLM in a separate process: a JSON job on stdin, JSON on the last line of stdout.

A job has `target`, `drafter`, its `method` or None for a folder of speculators, and `drafts`, the
number of tokens that are drafted in each pass. With `prompts` (token ids) they are decoded
greedily, all together, up to `max_tokens`. The result has, for each prompt, the tokens that each
pass added: a pass that accepts n drafts adds n + 1. A list of jobs with a `context` each gives a
list of results of `score`.

vLLM's kernel for CPUs norms the context's keys of every layer with the weights of the first layer,
so that vLLM's own DFlash classes draft worse. `mends_keys` in a job, and every list of jobs, gives
these classes the plugin's `norm_context_keys`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)

import torch
import torch.nn.functional as F
import treeflash_vllm
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from treeflash_vllm.model import norm_context_keys
from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader.utils import (
    get_model_cls,
    process_weights_after_loading,
)
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

Job = dict[str, Any]
vllm_norm_context_keys = DFlashQwen3Model._normalize_context_k


def arguments(job: Job) -> EngineArgs:
    """The arguments of an engine in float32."""
    model = job["target"]
    speculative = {"model": job["drafter"], "method": job["method"]}
    speculative["num_speculative_tokens"] = job["drafts"]
    if job["method"] is None:  # a folder of speculators names the target, the method and N
        model, speculative = job["drafter"], None
    return EngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=256,
        max_num_seqs=4,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        speculative_config=speculative,
    )


def decode(job: Job) -> list[list[list[int]]]:
    """The tokens that each pass added, for each prompt."""
    engine = LLMEngine.from_engine_args(arguments(job))
    params = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False
    )
    for i, prompt in enumerate(job["prompts"]):
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
    passes: list[list[list[int]]] = [[] for _ in job["prompts"]]
    while engine.has_unfinished_requests():
        for output in engine.step():
            known = passes[int(output.request_id.partition("-")[0])]
            if new := list(output.outputs[0].token_ids)[sum(map(len, known)) :]:
                known.append(new)
    return passes


class DenseAttention(torch.nn.Module):
    """In the place of vLLM's paged attention: of a block over its context and itself."""

    kv_cache = None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads = layer.num_heads, layer.num_kv_heads
        self.head_dim, self.scale = layer.head_dim, layer.scaling
        self.context: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def impl(self) -> DenseAttention:
        """The part of vLLM's attention that takes keys and values."""
        return self

    def do_kv_cache_update(self, _: Any, key: Any, value: Any, *__: Any) -> None:
        """Keep the keys and values of the context."""
        self.context = key, value

    def forward(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        parts = zip(self.context, (key, value), strict=True)
        keys, values = (
            torch.cat([old, new.unflatten(-1, (self.kv_heads, self.head_dim))]).transpose(0, 1)
            for old, new in parts
        )
        queries = query.unflatten(-1, (self.heads, self.head_dim)).transpose(0, 1)
        out = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], scale=self.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)


def refusal(job: Job) -> str | None:
    """Why vLLM's model runner for CPUs refuses a drafter; None if it runs it."""
    try:
        arguments(job).create_engine_config()
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return None


def layers_that_vllm_norms(model: DFlashQwen3Model) -> list[bool]:
    """For each layer, whether vLLM's kernel norms the context's keys with the layer's weights."""
    attention = model.layers[0].self_attn
    keys = torch.randn(len(model.layers), 3, attention.num_kv_heads, attention.head_dim)
    pairs = zip(vllm_norm_context_keys(model, keys), norm_context_keys(model, keys), strict=True)
    return [torch.allclose(actual, expected, atol=1e-5) for actual, expected in pairs]


@torch.inference_mode()
def score(job: Job) -> Job:
    """The method and model class of a drafter, and what the class computes for a block.

    The root of the block is the last token of the context. `marginals` are the (N, vocab) log
    probabilities of the slots. For DSpark `conditional` has the log probabilities after the tokens
    `previous`. For DFlash2 `candidates` and `scores` have the tokens of each slot and their logits
    after `previous`. `refusal` and `normed_layers` are the results of the two functions above; the
    class is built even if vLLM's runner refuses it.
    """
    refused = refusal(job)
    with patch.object(VllmConfig, "_validate_v1_model_runner"):
        config = arguments(job).create_engine_config()
    draft = config.speculative_config.draft_model_config
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            store = Path(tempfile.mkdtemp()) / "store"
            init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            initialize_model_parallel(1)
        draft_class = get_model_cls(draft)
        model = draft_class(vllm_config=config)
        tensors = load_file(Path(job["drafter"]) / "model.safetensors")
        model.load_weights(tensors.items())
        target = AutoModelForCausalLM.from_pretrained(job["target"], dtype=torch.float32)
        vocab = len(target.lm_head.weight)
        if "embed_tokens.weight" not in tensors:
            model.model.embed_tokens.weight[:vocab] = target.model.embed_tokens.weight
        if "lm_head.weight" not in tensors:
            model.lm_head.weight[:vocab] = target.lm_head.weight
        *context, root = job["context"]
        hidden = target(torch.tensor([context]), output_hidden_states=True).hidden_states
        features = torch.cat([hidden[i + 1][0] for i in job["layers"]], -1)
        for layer in model.model.layers:
            layer.self_attn.attn = DenseAttention(layer.self_attn)
        model.model._build_fused_kv_buffers()
        process_weights_after_loading(model, draft, torch.device("cpu"))
        n, drafts = len(context), job["drafts"]
        positions = torch.arange(n + 1 + drafts)
        slots = torch.zeros(n, dtype=torch.long)
        states = model.combine_hidden_states(features)
        model.precompute_and_store_context_kv(states, positions[:n], slots)
        rows = drafts if job["first_slot"] == 0 else 1 + drafts
        tokens = torch.tensor([root] + [job["mask_token_id"]] * (rows - 1))
        outputs = model(tokens, positions[n : n + rows])[-drafts:]
        logits = model.compute_logits(outputs)[:, :vocab]
        previous = torch.tensor(job["previous"])
        found: Job = {
            "method": config.speculative_config.method,
            "class": draft_class.__name__,
            "refusal": refused,
            "normed_layers": layers_that_vllm_norms(model.model),
            "marginals": logits.log_softmax(-1).tolist(),
        }
        if hasattr(model, "markov_embed"):
            embedded = model.markov_embed(previous)
            biased = logits + model.markov_bias(embedded)[:, :vocab]
            found["conditional"] = biased.log_softmax(-1).tolist()
        if hasattr(model, "compute_candidates"):
            tokens, values = model.compute_candidates(outputs)
            tokens = tokens.long()
            selector = model.model.candidate_selector
            projected = selector.hidden_projection(outputs)
            query = selector.predecessor_codebook[previous] * projected
            edges = torch.einsum("nr,ncr->nc", query, selector.successor_codebook[tokens])
            found["candidates"], found["scores"] = tokens.tolist(), (values + edges).tolist()
    return found


def main() -> None:
    """Run the job or the jobs."""
    treeflash_vllm.register()  # vLLM does so if the package is installed
    job = json.load(sys.stdin)
    if isinstance(job, list) or job["mends_keys"]:
        DFlashQwen3Model._normalize_context_k = norm_context_keys
    print(json.dumps(list(map(score, job)) if isinstance(job, list) else decode(job)))


if __name__ == "__main__":
    main()
