"""Layers of heads against layers of transformers, and layers that are made of parts of it.

The former are MTP heads with experts and latents; the latter are DeepSpec's EAGLE-3 heads for
Gemma 4.
"""

from importlib import import_module

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair
from published_drafters import BACKENDS, FLOAT32, TOLERANCE

from treeflash.decoding.session import SequenceSession
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.registry import loader
from treeflash.testing.models import normal, save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.torch as safetensors
from transformers.models.gemma4 import modeling_gemma4 as gemma4

FAMILIES = {"qwen-experts": "Qwen3Next", "glm": "Glm4Moe", "glm-latents": "DeepseekV3"}
"""By kind, how the names of transformers' classes begin."""


def theirs(kind, head):
    """Return transformers' rotary embedding and last layer, with the weights of a head."""
    settings = read_config(head)
    settings |= {"first_k_dense_replace": 0, "layer_types": ["full_attention"] * 4}
    if kind == "glm-latents":
        del settings["head_dim"]  # the width of rotary keys
    config = transformers.AutoConfig.for_model(**settings, attn_implementation="eager")
    module = import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    layer = getattr(module, f"{FAMILIES[kind]}DecoderLayer")(config, 3).eval()
    prefix = "mtp.layers.0." if kind == "qwen-experts" else "model.layers.4."
    tensors = {
        name.removeprefix(prefix): torch.tensor(x)
        for name, x in read_tensors(head).items()
        if name.startswith(prefix)
    }
    experts = {x: [] for x in ("gate_proj", "up_proj", "down_proj")}
    for part, stacked in experts.items():
        while (name := f"mlp.experts.{len(stacked)}.{part}.weight") in tensors:
            stacked.append(tensors[name])
    gate, up, down = map(torch.stack, experts.values())
    tensors |= {"mlp.experts.gate_up_proj": torch.cat([gate, up], 1), "mlp.experts.down_proj": down}
    missing, _ = layer.load_state_dict(tensors, strict=False)
    assert not missing
    return getattr(module, f"{FAMILIES[kind]}RotaryEmbedding")(config), layer


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_compute_what_transformers_does(kind, tmp_path):
    target, head = write_mtp_pair(tmp_path, kind)
    ours = loader("reference")(target, head, FLOAT32).drafter_model
    rotary, layer = theirs(kind, head)
    n = 9
    x = np.random.default_rng(0).normal(size=(n, 32)).astype(np.float32)
    positions, seen = np.arange(n, dtype=np.int32), np.tri(n, dtype=np.bool_)
    y = ours.normed("layer.input_layernorm", x)
    keys, values = ours.keys_and_values("layer.", y, positions)
    found = ours.layer((y, x), positions, keys, values, seen)
    rows, ids = torch.tensor(x)[None], torch.arange(n)[None]
    with torch.inference_mode():
        mask = torch.zeros(n, n).masked_fill(~torch.tensor(seen), -torch.inf)[None, None]
        expected = layer(
            rows, position_embeddings=rotary(rows, ids), attention_mask=mask, position_ids=ids
        )[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


PROMPT, PATH = [3, 1, 4, 1, 5, 9, 2, 6], [7, 2, 11]


def published_log_probs(target, head):
    """Natural logarithms after each token of the path, of which the first is the root."""
    settings = read_config(head)
    tensors = safetensors.load_file(head / "model.safetensors")
    heads, size = settings["num_attention_heads"], settings["global_head_dim"]
    eps, states = settings["rms_norm_eps"], settings["hidden_size"]
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    hidden = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    features = torch.cat([hidden[i + 1][0] for i in settings["target_layer_ids"]], -1)
    mlp = gemma4.Gemma4TextMLP(
        transformers.Gemma4TextConfig(**settings, layer_types=["full_attention"]), 0
    )
    mlp.load_state_dict({x: tensors[f"midlayer.mlp.{x}"] for x, _ in mlp.named_parameters()})
    share = settings["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    base = settings["rope_parameters"]["full_attention"]["rope_theta"]
    frequencies = base ** -(torch.arange(0, size, 2) / size)
    frequencies[int(share * size / 2) :] = 0
    embedding = gemma4.Gemma4TextScaledWordEmbedding(
        settings["vocab_size"], states, 0, embed_scale=states**0.5
    )
    embedding.weight.data = tensors["embed_tokens.weight"]  # not the target's

    def normed(name, x):
        norm = gemma4.Gemma4RMSNorm(x.shape[-1], eps, with_scale=name is not None)
        if name is not None:
            norm.weight.data = tensors[name + ".weight"]
        return norm(x)

    def projected(name, x):
        return (x @ tensors[f"midlayer.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size))

    def rotated(x, first):
        angles = (first + torch.arange(len(x)))[:, None] * torch.cat([frequencies] * 2)
        return gemma4.apply_rotary_pos_emb(x, angles.cos(), angles.sin(), unsqueeze_dim=1)

    def layer(x, tokens, keys, values):
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
def test_log_probs_are_the_published_ones(backend, shared, tmp_path):
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
