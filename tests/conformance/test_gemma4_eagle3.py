"""DeepSpec's EAGLE-3 heads for Gemma 4, against a layer made of parts of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair
from published_drafters import BACKENDS, FLOAT32, TOLERANCE

from treeflash.decoding.session import SequenceSession
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.registry import loader
from treeflash.testing.models import normal, save

torch = pytest.importorskip("torch")
import safetensors.torch as safetensors
from transformers import AutoModelForCausalLM, Gemma4TextConfig
from transformers.models.gemma4 import modeling_gemma4 as gemma4

PROMPT, PATH = [3, 1, 4, 1, 5, 9, 2, 6], [7, 2, 11]


def published_log_probs(target: Path, head: Path) -> np.ndarray:
    """Natural logarithms after each token of the path, of which the first is the root."""
    settings = read_config(head)
    tensors = safetensors.load_file(head / "model.safetensors")
    heads, size = settings["num_attention_heads"], settings["global_head_dim"]
    eps, states = settings["rms_norm_eps"], settings["hidden_size"]
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    hidden = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    features = torch.cat([hidden[i + 1][0] for i in settings["target_layer_ids"]], -1)
    mlp = gemma4.Gemma4TextMLP(Gemma4TextConfig(**settings, layer_types=["full_attention"]), 0)
    mlp.load_state_dict({x: tensors[f"midlayer.mlp.{x}"] for x, _ in mlp.named_parameters()})
    share = settings["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    base = settings["rope_parameters"]["full_attention"]["rope_theta"]
    frequencies = base ** -(torch.arange(0, size, 2) / size)
    frequencies[int(share * size / 2) :] = 0
    embedding = gemma4.Gemma4TextScaledWordEmbedding(
        settings["vocab_size"], states, 0, embed_scale=states**0.5
    )
    embedding.weight.data = tensors["embed_tokens.weight"]  # not the target's

    def normed(name: str | None, x: Any) -> Any:
        norm = gemma4.Gemma4RMSNorm(x.shape[-1], eps, with_scale=name is not None)
        if name is not None:
            norm.weight.data = tensors[name + ".weight"]
        return norm(x)

    def projected(name: str, x: Any) -> Any:
        return (x @ tensors[f"midlayer.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size))

    def rotated(x: Any, first: int) -> Any:
        angles = (first + torch.arange(len(x)))[:, None] * torch.cat([frequencies] * 2)
        return gemma4.apply_rotary_pos_emb(x, angles.cos(), angles.sin(), unsqueeze_dim=1)

    def layer(x: Any, tokens: list[int], keys: Any, values: Any) -> tuple[Any, Any, Any]:
        """The outputs of rows, which follow the rows of the keys and values."""
        first = len(keys)
        read = normed("midlayer.input_layernorm", embedding(torch.tensor(tokens)))
        read = torch.cat([read, normed("midlayer.hidden_norm", x)], -1)
        k = projected("k", read)
        v = normed(None, k if settings["attention_k_eq_v"] else projected("v", read))
        keys = torch.cat([keys, rotated(normed("midlayer.self_attn.k_norm", k), first)])
        values = torch.cat([values, v])
        q = rotated(normed("midlayer.self_attn.q_norm", projected("q", read)), first)
        groups = heads // keys.shape[1]
        scores = torch.einsum("nhd,mhd->hnm", q, keys.repeat_interleave(groups, 1))
        seen = torch.ones(len(x), len(keys), dtype=torch.bool).tril(first)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = torch.einsum("hnm,mhd->nhd", weights, values.repeat_interleave(groups, 1)).flatten(1)
        out = out @ tensors["midlayer.self_attn.o_proj.weight"].T
        x = x + normed("midlayer.post_attention_layernorm", out)
        y = normed("midlayer.pre_feedforward_layernorm", x)
        x = x + normed("midlayer.post_feedforward_layernorm", mlp(y))
        return x * tensors["midlayer.layer_scalar"], keys, values

    kv_heads = 1 if settings["attention_k_eq_v"] else settings["num_key_value_heads"]
    keys = values = torch.zeros(0, kv_heads, size)
    x = features @ tensors["fc.weight"].T
    rows = []
    for tokens in ([*PROMPT[1:], PATH[0]], *([token] for token in PATH[1:])):
        x, keys, values = layer(x, tokens, keys, values)
        x = x[-1:]
        logits = normed("norm", x) @ tensors["lm_head.weight"].T
        cap = settings["final_logit_softcapping"]
        rows.append((torch.tanh(logits / cap) * cap).log_softmax(-1)[0])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("shared", [True, False], ids=["keys are values", "values of their own"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_are_the_published_ones(backend: str, shared: bool, tmp_path: Path) -> None:
    pytest.importorskip(BACKENDS[backend])
    target, head = write_mtp_pair(tmp_path, "eagle3-gemma4", attention_k_eq_v=shared)
    config = read_config(head)
    shape = config["vocab_size"], config["hidden_size"]
    embeddings = {"embed_tokens.weight": normal(np.random.default_rng(5), *shape)}
    save(head, config, read_tensors(head) | embeddings)
    with torch.inference_mode():
        expected = published_log_probs(target, head)
    pair = loader(backend)(target, head, FLOAT32)
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend(PROMPT)
        block = sequence.draft(PATH[0])
        actual = pair.head.log_probs(block, np.array(PATH, np.int32))
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    assert np.ptp(expected, 0).max() > 100 * TOLERANCE  # the rows differ
