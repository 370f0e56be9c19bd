"""Targets with layers of our own give what transformers' models give, and others keep theirs."""

from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from adapters import ones, write_adapter
from faulty_kernels import faulty
from parts import load_with_parts
from scheduled_texts import assert_plain_texts
from stand_ins import stand_in

from treeflash.config import LoadConfig
from treeflash.decoding.backend_base import CommittedPath
from treeflash.decoding.tree import DraftTree
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_target

require("torch")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from treeflash_cuda import target_loading
from treeflash_cuda.backend import load
from treeflash_cuda.cpu.decoder_target import CpuTarget
from treeflash_cuda.decoder import operations as decoder_operations
from treeflash_cuda.decoder.facts import decoder_facts
from treeflash_cuda.decoder.weights import Checkpoint, Joined
from treeflash_cuda.gpu import decoder_target as gpu_target
from treeflash_cuda.gpu import row_pass
from treeflash_cuda.gpu.decoder_target import GpuTarget
from treeflash_cuda.gpu.prompt_attention import causal_attention
from treeflash_cuda.hf.model_target import ModelTarget
from treeflash_cuda.operations import Operations
from treeflash_cuda.target import read_model_config
from treeflash_cuda.target_loading import load_decoder


def fields(**settings):
    """Settings of a configuration."""
    return settings


def rope(kind, **settings):
    """A kind of rotary embeddings."""
    return {"rope_type": kind, **settings}


VOCAB = 40
SMALL = fields(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, rope_theta=1000.0, max_position_embeddings=256,
)  # fmt: skip
BY_TURNS = fields(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6)
WINDOWS = BY_TURNS | {"use_sliding_window": True}
DEFAULT = rope("default", rope_theta=1000.0)
LINEAR = rope("linear", factor=2.0, rope_theta=99.0)
LLAMA3 = rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = rope("yarn", factor=4.0, rope_theta=1000.0, original_max_position_embeddings=64)
LONGROPE = rope(
    "longrope", rope_theta=1000.0, original_max_position_embeddings=128,
    short_factor=[1.0, 1.5, 2.5], long_factor=[2.0, 3.0, 9.0],
)  # fmt: skip
BIASES = fields(attention_bias=True, mlp_bias=True)
GEMMA = BY_TURNS | fields(head_dim=16, query_pre_attn_scalar=9, final_logit_softcapping=3.0)
UNBOUND = fields(attn_logit_softcapping=None, final_logit_softcapping=None)
LOCAL_AND_GLOBAL = {"full_attention": LINEAR, "sliding_attention": DEFAULT}
GEMMA3 = GEMMA | fields(rope_parameters=LOCAL_AND_GLOBAL)
STRETCHED = fields(rope_parameters={"full_attention": YARN, "sliding_attention": DEFAULT})
GRANITE = BIASES | fields(
    embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.7, logits_scaling=5.0
)
EXPERTS = fields(num_experts=6, num_local_experts=6, num_experts_per_tok=3)
QWEN_MOE = EXPERTS | fields(
    head_dim=16, moe_intermediate_size=32, norm_topk_prob=True, mlp_only_layers=[1]
)
SHARED_EXPERT = QWEN_MOE | fields(shared_expert_intermediate_size=40)
DELTA_NET = fields(
    head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=12, layer_types=["linear_attention", "full_attention"] * 2,
    rope_parameters=DEFAULT | {"partial_rotary_factor": 0.5},
)  # fmt: skip
CASES = {
    "llama": fields(head_dim=16),
    "llama, biases, tied": BIASES | fields(tie_word_embeddings=True, num_key_value_heads=4),
    "llama, llama3": fields(rope_parameters=LLAMA3),
    "llama, linear": fields(rope_parameters=LINEAR),
    "mistral": fields(sliding_window=6, head_dim=16),
    "mistral, no window": fields(sliding_window=None),
    "qwen2": {},
    "qwen2, windows": WINDOWS,
    "qwen3": fields(head_dim=16),
    "qwen3, windows, biases": WINDOWS | fields(head_dim=24, attention_bias=True),
    "qwen3, yarn": fields(head_dim=16, rope_parameters=YARN),
    "smollm3": fields(tie_word_embeddings=False),
    "smollm3, windows": WINDOWS | fields(no_rope_layers=[1, 0, 1, 0], mlp_bias=True),
    "gemma2": GEMMA | fields(attn_logit_softcapping=2.0),
    "gemma2, no caps, biases": GEMMA
    | UNBOUND
    | fields(attention_bias=True, tie_word_embeddings=False),
    "gemma3_text": GEMMA3,
    "glm": fields(head_dim=16, attention_bias=True),
    "glm4": fields(head_dim=16, attention_bias=True, tie_word_embeddings=True),
    "granite": GRANITE,
    "mixtral": EXPERTS | fields(sliding_window=6, head_dim=16),
    "olmo2": fields(attention_bias=True),
    "olmo3": STRETCHED | BY_TURNS,
    "olmoe": EXPERTS | fields(num_attention_heads=2),
    "phi3": fields(sliding_window=6, rope_parameters=LONGROPE | {"partial_rotary_factor": 0.75}),
    "phi3, plain": fields(num_key_value_heads=4),
    "qwen3_5_text": DELTA_NET | fields(attention_bias=True),
    "qwen3_5_moe_text": SHARED_EXPERT | DELTA_NET,
    "qwen3_next": SHARED_EXPERT | DELTA_NET | fields(linear_value_head_dim=16),
    "qwen3_moe": QWEN_MOE | fields(use_sliding_window=True, sliding_window=6),
}
WIDE = fields(head_dim=32, linear_value_head_dim=16)
COMPILED = {
    "llama, compiled": fields(head_dim=32),
    "qwen3, compiled": WINDOWS | fields(head_dim=64),
    "smollm3, compiled": fields(head_dim=32, no_rope_layers=[1, 0, 1, 0]),
    "mistral, compiled": fields(head_dim=32, sliding_window=6),
    "gemma2, compiled": GEMMA | fields(head_dim=64, attn_logit_softcapping=2.0, vocab_size=48),
    "gemma3_text, compiled": GEMMA3 | fields(head_dim=32, vocab_size=48),
    "glm4, compiled": fields(head_dim=64, attention_bias=True),
    "granite, compiled": GRANITE | fields(head_dim=32),
    "olmo3, compiled": STRETCHED | BY_TURNS | fields(head_dim=32),
    "phi3, compiled": fields(head_dim=32),
    "qwen3_5_text, compiled": DELTA_NET | WIDE | fields(linear_conv_kernel_dim=3),
    "qwen3_next, compiled": SHARED_EXPERT
    | DELTA_NET
    | WIDE
    | fields(shared_expert_intermediate_size=48),
    "qwen3_moe, compiled": QWEN_MOE | fields(head_dim=32),
}
"""Models whose sizes fit the compiled functions of layers."""
CASES |= COMPILED
PROMPT, OTHER = [3, 9, 1, 22, 17, 30, 4, 8, 8, 2, 35], [5, 11, 7]
TREE = DraftTree.from_parents(
    np.array([6, 13, 21, 2, 39, 13, 0], np.int32), np.array([-1, 0, 0, 1, 3, 2, 3], np.int32)
)
TOLERANCE = 1e-5


def write(folder, name, **settings):
    """Save a random model, whose attention is sharp and whose norms and biases matter."""
    family = name.partition(",")[0]
    settings = SMALL | {"pad_token_id": None} | CASES.get(name, {}) | settings
    torch.manual_seed(0)  # rates of recurrent layers are drawn
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model.eval()


def load_pair(folder, **settings):
    settings = {"dtype": "float32"} | settings
    return load(folder, None, LoadConfig(device="cpu", **settings))


def passes(backend):
    """Run prompts, trees, batches and a lone token, and yield the passes.

    Beside each are, by sequence, the numbers of rows that have logits, and the texts up to them.
    """
    verifier = backend.verifier
    backend.target.capture(range(-1, len(backend.target.layers) + 1))
    with (
        closing(backend.open(64, drafts=False)) as state,
        closing(backend.open(64, drafts=False)) as other,
    ):
        texts = {state: (), other: ()}
        for batch in (
            [(state, PROMPT[:7])],
            [(state, PROMPT[7:]), (other, OTHER)],
            [(state, TREE)],
            [(other, TREE), (state, TREE)],
            [(other, OTHER[:1])],
        ):
            done, rows = verifier.forward(batch, [True] * len(batch)), {}
            for own, tokens in batch:
                if tokens is TREE:
                    paths = map(np.flatnonzero, TREE.ancestor_mask())
                    rows[own] = [(x[-1], (*texts[own], *TREE.tokens[x].tolist())) for x in paths]
                else:
                    texts[own] += tuple(tokens)
                    rows[own] = [(len(tokens) - 1, texts[own])]
            yield done, rows
            if batch[0][1] is not TREE:
                verifier.commit_paths(list(map(CommittedPath.whole, done.rows)))


@torch.inference_mode()
def expected_outputs(model, texts):
    """The last token's logits, and its outputs of all layers, by transformers alone, by text."""
    layers = []
    hooks = [
        layer.register_forward_hook(lambda _, __, y: layers.append(y))
        for layer in model.model.layers
    ]
    # A text's tokens do not see the padding after them.
    columns = max(map(len, texts))
    padded = torch.tensor([[*text, *[0] * (columns - len(text))] for text in texts])
    output = model(padded, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    embeddings, *_, normed = output.hidden_states
    hidden = dict(enumerate([embeddings, *layers, normed], -1))
    return {
        text: (output.logits[i, len(text) - 1], {n: x[i, len(text) - 1] for n, x in hidden.items()})
        for i, text in enumerate(texts)
    }


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def difference(backend, model):
    """The largest difference of logits, and of layers' outputs, from transformers'."""
    found = []
    for done, rows in passes(backend):
        for own, logits in zip(done.rows, done.logits.parts, strict=True):
            layers = own.outputs.layers
            for (row, text), x in zip(rows[own.state], logits, strict=True):
                found.append((text, x, {n: y[own.first + row] for n, y in layers.items()}))
    expected = expected_outputs(model, list(dict.fromkeys(text for text, *_ in found)))
    return max(
        relative(x, y)
        for text, logits, layers in found
        for x, y in (
            (logits, expected[text][0]),
            *((layers[n], expected[text][1][n]) for n in layers),
        )
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_and_layers_are_those_of_transformers(tmp_path, name):
    model = write(tmp_path, name)
    backend = load_pair(tmp_path)
    assert isinstance(backend.target, CpuTarget)
    assert (backend.target.kernels is not None) == (name in COMPILED)
    layers = backend.device_report().facts["layers of the target"]
    assert layers.startswith("treeflash, compiled for" if name in COMPILED else "treeflash")
    assert difference(backend, model) <= TOLERANCE


ON_GPUS = [x for x in CASES if x not in COMPILED]
"""Models that a GPU runs as others: its operations have no limits of their sizes."""


@pytest.mark.sample(5)
@pytest.mark.parametrize("prompts", ["rows", "kernel"])
@pytest.mark.parametrize("name", ON_GPUS)
def test_operations_of_a_gpu_give_the_logits_of_transformers(tmp_path, monkeypatch, name, prompts):
    """Prompts are rows of the pass that graphs have, or attend by a kernel of their own."""
    model = write(tmp_path, name)
    backend = load_with_parts(monkeypatch, tmp_path)
    assert isinstance(backend.target, GpuTarget)
    assert backend.device_report().facts["layers of the target"] == "treeflash"
    if prompts == "kernel" and backend.target.softcap is None:
        stand_in(monkeypatch, row_pass, MAX_CHUNK=2)
        stand_in(monkeypatch, gpu_target, MAX_ROWS=2)
        backend.target.prompt_attention = causal_attention
    assert difference(backend, model) <= TOLERANCE


def in_layers(**attributes):
    """Change attributes of the layers, or of their mixers or networks."""

    def change(model):
        for layer in model.layers:
            for name, value in attributes.items():
                parts = layer, layer.mixer, layer.network
                owner = next((x for x in parts if hasattr(x, name)), layer.mixer)
                setattr(owner, name, value)

    return change


def with_heads_normed_alone(model):
    for part in (model, *model.layers, *(layer.mixer for layer in model.layers)):
        part.facts = replace(part.facts, norms_heads="each")


def with_norms_in_the_order_of_files(model):
    for layer in model.layers:
        if hasattr(layer.mixer, "head_norms"):
            norms = layer.mixer.head_norms
            layer.mixer.head_norms = norms[:, model.facts.head_order.argsort()]


def turned_the_other_way(model):
    rotation = model.rotation

    def turned(*given):
        cos, sin = rotation(*given)
        return cos, -sin

    model.rotation = turned


def with_sums_that_are_not_normed(model):
    plain = decoder_operations.rms_norm

    def rms_norm(x, weight, eps, residual=None):
        return plain(x, weight, eps)[0], plain(x, weight, eps, residual)[1]

    in_layers(operations=replace(decoder_operations.PYTORCH, rms_norm=rms_norm))(model)


def in_files(folder, fault):
    """Let the configuration, or tensors whose names end so, be what the fault makes of them."""
    if isinstance(fault, dict):
        edit_config(folder, lambda config: config.update(fault))
    elif isinstance(fault, tuple):
        end, change = fault
        tensors = load_file(folder / "model.safetensors")
        found = {name: change(x) for name, x in tensors.items() if name.endswith(end)}
        assert found
        save_file(tensors | found, folder / "model.safetensors", {"format": "pt"})


ONE_ROPE = dict.fromkeys(LOCAL_AND_GLOBAL, LINEAR)
WHOLE_HEADS = LONGROPE | {"short_factor": [1.0, 1.5, 2.5, 3.5], "long_factor": [2.0, 3.0, 9.0, 9.0]}
FAULTS = {
    "swapped halves": ("llama", turned_the_other_way),
    "a norm without weights": ("llama", ("post_attention_layernorm.weight", torch.ones_like)),
    "sums that are not normed": ("llama", with_sums_that_are_not_normed),
    "no frequencies of llama3": ("llama, llama3", {"rope_parameters": {"rope_theta": 500.0}}),
    "no scale of YaRN": ("qwen3, yarn", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    "no biases": ("qwen2", ("_proj.bias", torch.zeros_like)),
    "no norms of heads": ("qwen3", in_layers(head_norms=None)),
    "no window": ("mistral", {"sliding_window": None}),
    "a window in every layer": ("qwen2, windows", {"layer_types": ["sliding_attention"] * 4}),
    "a rotation in every layer": ("smollm3", {"no_rope_layers": [1] * 4}),
    "one rotation in every layer": ("gemma3_text", {"rope_parameters": ONE_ROPE}),
    "no offset of norms": ("gemma3_text", ("input_layernorm.weight", lambda x: x - 1)),
    "no norms of what sublayers add": ("gemma2", in_layers(attention_norm=None)),
    "no scaled embeddings": (
        "gemma2, no caps, biases",
        ("embed_tokens.weight", lambda x: x / SMALL["hidden_size"] ** 0.5),
    ),
    "scores of other heads": ("gemma3_text", {"query_pre_attn_scalar": GEMMA["head_dim"]}),
    "no bound of scores": ("gemma2", {"attn_logit_softcapping": None}),
    "no bound of logits": ("gemma3_text", {"final_logit_softcapping": None}),
    "no factor on sublayers": ("granite", {"residual_multiplier": 1.0}),
    "no divisor of logits": ("granite", {"logits_scaling": 1.0}),
    "heads that are normed alone": ("olmo2", with_heads_normed_alone),
    "a rotated rest of heads": ("phi3", {"rope_parameters": WHOLE_HEADS}),
    "weights of experts that sum to less": ("qwen3_moe", {"norm_topk_prob": False}),
    "other experts": ("mixtral", {"num_experts_per_tok": 2}),
    "another activation": ("gemma3_text", in_layers(activation="silu")),
    "no gates of attention": ("qwen3_5_text", in_layers(gate=None)),
    "states that last longer": ("qwen3_5_text", ("A_log", lambda x: x - np.log(2))),
    "norms in another order": ("qwen3_5_text", with_norms_in_the_order_of_files),
    "no shared experts": ("qwen3_5_moe_text", in_layers(shared=None)),
}
"""Of each a model, and what is changed: its configuration, its tensors, or its layers."""


FAULTS_OF_A_GPU = (
    *("swapped halves", "no scale of YaRN", "no norms of heads", "no window"),
    *("a rotation in every layer", "no bound of scores", "heads that are normed alone"),
    *("weights of experts that sum to less", "other experts"),
)


@pytest.mark.parametrize(
    ("fault", "on_gpu"), [*product(FAULTS, [False]), *product(FAULTS_OF_A_GPU, [True])]
)
@torch.inference_mode()
def test_faults_are_noticed(tmp_path, monkeypatch, fault, on_gpu):
    """On a GPU those of its attention and its experts: the layers are the same."""
    name, change = FAULTS[fault]
    model = write(tmp_path, name)
    in_files(tmp_path, change)
    backend = load_with_parts(monkeypatch, tmp_path) if on_gpu else load_pair(tmp_path)
    assert isinstance(backend.target, GpuTarget if on_gpu else CpuTarget)
    if callable(change):
        change(backend.target.model)
    assert difference(backend, model) > 100 * TOLERANCE


EXACT = (
    *("llama, biases, tied", "mistral", "qwen2", "qwen3", "smollm3", "gemma2, no caps, biases"),
    *("gemma2, compiled", "gemma3_text, compiled", "glm4", "granite", "mixtral", "olmo3", "olmoe"),
    *("phi3", "qwen3_moe", "olmo3, compiled", "phi3, compiled", "qwen3_moe, compiled"),
)
"""Scores and logits are bounded by compiled functions alone in exact mode."""


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_exact_mode_is_granted_and_drafts_change_no_text(tmp_path, name, dtype):
    """The check at load compares trees, prompts in chunks and a batch with single tokens."""
    write(tmp_path / "target", name)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    settings = LoadConfig(device="cpu", dtype=dtype, exact=True)
    backend = load(tmp_path / "target", tmp_path / "drafter", settings)
    assert isinstance(backend.target, CpuTarget)
    assert backend.target.is_exact
    assert backend.inexact is None
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "max_tokens": 12}
        assert_plain_texts(backend, [PROMPT, OTHER], ("treeflash", 8), **options)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gemma", {}, "no layers of its own for gemma models"),
        ("olmoe", {"clip_qkv": 5.0}, "its queries and keys are clipped"),
        ("phi3", {"rope_parameters": rope("default", partial_rotary_factor=0.4)}, "in part"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "its tokens see later ones"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": rope("dynamic", factor=2.0)}, "a text's length"),
        ("llama", {"num_key_value_heads": 3}, "cannot share its keys evenly"),
        ("llama", {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "rotated in part"),
        ("qwen2", {"layer_types": BY_TURNS["layer_types"]}, "its windows have no size"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised"),
    ],
)
def test_other_facts_are_refused(family, settings, reason):
    found = decoder_facts(AutoConfig.for_model(family, **SMALL | settings))
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize(
    ("family", "settings", "options", "reason"),
    [
        ("llama", {}, {"pack": False}, "training reads its layers"),
        ("llama", {"compile": True}, {}, "its layers are compiled"),
        ("llama", {"device_map": "auto"}, {}, "several devices have its layers"),
        ("llama", {}, {"processes": 2}, "several devices have its layers"),
        ("qwen3_5", {}, {"images": True}, "it reads images"),
        ("qwen3_5", {"adapter": "x"}, {}, "its tensors have other names than the layers of its ad"),
        ("qwen3_5", {}, {}, "flash-linear-attention computes its prompts"),
        # PyTorch's definitions are for comparisons alone.
        ("qwen3_moe", {}, {"lacks": "tree_attention"}, "attention has no kernel here"),
        ("qwen3_moe", {}, {"lacks": "grouped_linear"}, "experts have no kernel here"),
    ],
)
def test_what_keeps_the_model_of_transformers(
    tmp_path, monkeypatch, family, settings, options, reason
):
    write_target(tmp_path, family, seed=1)
    options = {"pack": True, "processes": 1} | options
    lacking = Operations(reasons={options.pop("lacks", None): "ptxas is missing"})
    stand_in(monkeypatch, target_loading, load_target_operations=lambda *_: lacking)
    stand_in(monkeypatch, target_loading, find_spec=lambda name: name == "fla" or None)
    config, on_gpu = read_model_config(tmp_path), torch.device("cuda")
    found = load_decoder(tmp_path, config, LoadConfig(**settings), on_gpu, None, **options)
    assert str(found).startswith(reason)


@pytest.mark.parametrize("name", ["glm4", "phi3, plain", "llama, biases, tied"])
@torch.inference_mode()
def test_adapters_are_merged_into_what_layers_read(tmp_path, monkeypatch, name):
    """Weights are then joined, and the rows of heads change places."""
    model, updates = write(tmp_path / "target", name), {}
    for layer, module in model.named_modules():
        if type(module) is torch.nn.Linear and module.weight is not model.lm_head.weight:
            out, width = module.weight.shape
            updates[layer] = a, b = torch.randn(2, width), torch.randn(out, 2) / width**0.5
            module.weight += b @ a
    write_adapter(tmp_path / "adapter", updates)
    settings = {"adapter": str(tmp_path / "adapter")}
    for load_target in (load_pair, partial(load_with_parts, monkeypatch)):
        backend = load_target(tmp_path / "target", **settings)
        assert isinstance(backend.target, CpuTarget | GpuTarget)
        assert difference(backend, model) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (
            "model.layers.9.mlp.up_proj",
            (48, 32),
            r"no linear layer of this name and shape \(48, 32",
        ),
        ("model.layers.0.mlp.up_proj", (8, 32), r"no linear layer of this name and shape \(8, 32"),
        ("model.embed_tokens", (VOCAB, 32), "no linear layer of this name and shape"),
        ("lm_head", (VOCAB, 32), "it shares its weight with the embeddings"),
    ],
)
def test_an_adapter_of_other_layers_is_refused(tmp_path, name, shape, reason):
    write(tmp_path / "target", "llama, biases, tied")
    write_adapter(tmp_path / "adapter", {name: ones(*shape)})
    message = f"the adapter cannot be merged into {name}: .*{reason}"
    with pytest.raises(UnsupportedModelError, match=message):
        load_pair(tmp_path / "target", adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_no_plain_numbers_keep_the_model_of_transformers(tmp_path, dtype):
    write_target(tmp_path, "llama", seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 32).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path, {}).foreign == "its weights are not plain numbers"


def test_tensors_with_other_names_keep_the_model_of_transformers(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    without = {name.removeprefix("model."): x for name, x in tensors.items()}
    save_file(without, tmp_path / "model.safetensors", {"format": "pt"})
    backend = load_pair(tmp_path)
    assert isinstance(backend.target, ModelTarget)
    facts = backend.device_report().facts
    assert facts["layers of the target"] == "transformers, because its tensors have other names"


def test_a_copy_of_tied_embeddings_in_the_file_is_not_kept(tmp_path):
    write_target(tmp_path, "llama", seed=1, tied=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    target = load_pair(tmp_path).target
    assert target.lm_head_weight.data_ptr() == target.embeddings.data_ptr()


def test_a_file_that_changes_later_changes_no_weight(tmp_path):
    write_target(tmp_path, "llama", seed=1, tied=True)
    backend = load_pair(tmp_path)
    assert backend.device_report().facts["layers of the target"] == "treeflash"
    before = backend.target.embeddings.clone()
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(backend.target.embeddings, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight has the shape \(31,\), and its config.json asks for \(32,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    write_target(tmp_path, "llama", seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_pair(tmp_path)


ROUNDED = {
    "llama, compiled": {},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3, compiled": {},
    "smollm3, compiled": {},
    "gemma2, compiled": {},
    "granite, compiled": {},
}
"""Targets for weights of few bits; layers of the last two have other norms, or a factor."""


@torch.inference_mode()
def outputs_of(backend):
    """Logits and outputs of layers."""
    return [
        x
        for done, _ in passes(backend)
        for x in (*done.logits.parts, *done.rows[0].outputs.layers.values())
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ROUNDED)
def test_layers_in_one_call_have_the_bits_of_their_modules(tmp_path, name, dtype):
    pytest.importorskip("llvmlite")
    write(tmp_path, name, intermediate_size=64, **ROUNDED[name])
    backend = load_pair(tmp_path, dtype=dtype, bits=4, exact=True)
    target = backend.target
    assert (target.calls is None) == (name in list(ROUNDED)[-2:])
    if target.calls is not None:
        actual = outputs_of(backend)
        target.calls = None
        expected = outputs_of(backend)
        assert len(actual) == len(expected)
        assert all(map(torch.equal, actual, expected))


@pytest.fixture(scope="module")
def with_parts(tmp_path_factory):
    """A pair whose layers have joined products, as files with several types, and its outputs."""
    pytest.importorskip("llvmlite")
    folder = tmp_path_factory.mktemp("parts")
    write(folder, "qwen3, compiled", intermediate_size=64)
    backend = load_pair(folder, bits=4, exact=True)
    facts = backend.target.facts
    of_heads = [count * facts.head_dim for count in (facts.heads, facts.kv_heads, facts.kv_heads)]
    for layer in backend.target.layers:
        layer.mixer.qkv = split(layer.mixer.qkv, of_heads)
        layer.network.gate_up = split(layer.network.gate_up, [facts.intermediate_size] * 2)
    backend.target.calls = None
    return backend, outputs_of(backend)


def split(layer, counts):
    rows = torch.arange(sum(counts)).split(counts)
    return Joined([layer.select(own) for own in rows])


CALL_FAULTS = {
    "none": ("calls", "calls"),
    "all parts in the first one's columns": ("column += layer.shape[0]", "column += 0"),
    "columns counted in bytes": ("x.column * self.dtype.itemsize", "x.column"),
    "parts of a pass's memory that overlap": (
        "self.starts[name] = self.row_nbytes",
        "self.starts[name] = self.row_nbytes // 2",
    ),
    "the memory of a pass of one row": ("memory + rows * start", "memory + start"),
    "attention before keys are written": ('from ("turn", "attend"', 'from ("attend", "turn"'),
    "norms of layers in another order": (
        "(layer.input_norm, layer.network_norm)",
        "(layer.network_norm, layer.input_norm)",
    ),
    "products of layers in another order": ("(list(chain(*products", "(list(chain(*products[::-1]"),
    "the other residual": ('"residual": residuals[:-1]', '"residual": residuals[1:]'),
    "an output before the network": ("number = 2 * layer + 1", "number = 2 * layer"),
    "no head norms": ("norms, np.sign(norms), stack.eps", "norms, 0, stack.eps"),
    "windows of the other layers": (
        "layer.seen for layer in layers",
        "layer.seen for layer in layers[::-1]",
    ),
    "scores without their scale": ("stack.score_scale, ", "1.0, "),
    "the places of the first pass": (
        "attention.places.fill(turns",
        'self.__dict__.setdefault("kept", attention).places.fill(turns',
    ),
    "no masks of trees": ("table.fill(attends", "attention.places.fill(attends"),
}


@pytest.mark.parametrize("fault", CALL_FAULTS)
def test_faults_of_layers_in_one_call_are_noticed(tmp_path, with_parts, monkeypatch, fault):
    """None of them reads or writes memory that the right code leaves alone."""
    from treeflash_cuda.cpu import decoder_calls, layer_calls

    backend, expected = with_parts
    target = backend.target
    broken = faulty(layer_calls, tmp_path, *CALL_FAULTS[fault])
    stand_in(monkeypatch, decoder_calls, products_of=broken.products_of)
    calls = broken.LayerCalls(decoder_calls.decoder_stack(target.model), target.kernels)
    stand_in(monkeypatch, target, calls=calls)
    equal = all(map(torch.equal, outputs_of(backend), expected))
    assert equal == (fault == "none")
