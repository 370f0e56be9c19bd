"""Tiny random models of transformers' and mlx-lm's types: which can branch, and their texts."""

import itertools

import pytest
from engines import each
from families import LAYERS, attempt, write_pair

from treeflash.config import METHODS, DecodeConfig, SamplingConfig
from treeflash.testing import require
from treeflash.testing.comparisons import generate, steps_of, tokens_of
from treeflash.training.distillation import Response

COMMON = {
    "cuda": ("qwen3_5", "falcon_h1", "lfm2"),
    "mlx": ("qwen3_5", "kimi_linear", "granitemoehybrid", "bailing_hybrid", "lfm2"),
}
"""Hybrid types with each kind of recurrent layer."""
HYBRIDS = {
    "cuda": (
        *COMMON["cuda"],
        *("qwen3_next", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid"),
        *("lara_mini", "mamba2", "bamba", "granitemoehybrid", "nemotron_h", "zamba2"),
        *("lfm2_moe", "lfm3"),
    ),
    "mlx": (
        *COMMON["mlx"],
        *("qwen3_5_moe", "qwen3_next", "olmo_hybrid", "kimi_k3", "bailing_moe_v3"),
        *("bailing_moe_linear", "mamba2", "nemotron_h", "falcon_h1", "plamo2", "lfm2_moe"),
        "gear",
    ),
}
ATTENTION = {
    "cuda": ("cohere2", "gemma3n_text", "gpt_oss", "olmoe", "starcoder2"),
    "mlx": (
        *("llama", "qwen2_moe", "mixtral", "gemma2", "gemma3_text", "gpt_oss", "cohere2"),
        *("olmo3", "glm4", "phi3", "smollm3", "deepseek_v3", "afm7"),
        "phixtral",  # one of its layers of attention is named after its rotation
    ),
}


@pytest.mark.sample(4)
@each(("name",), **ATTENTION)
def test_trees_are_plain_texts(engine, name):
    """After every sliding window, in trees, in batches and after commits."""
    assert attempt(engine.families, name)[0] == "verified"


@pytest.mark.sample(5)
@each(("name",), **HYBRIDS)
def test_trees_of_recurrent_layers_are_plain_texts(engine, name):
    assert attempt(engine.families, name)[0] == "verified"


NO_HOOKS = "models cannot run a draft tree: "


@pytest.mark.sample(6)
@each(
    ("name", "reason"),
    cuda=[
        *(("mamba", NO_HOOKS), ("minimax", NO_HOOKS)),
        ("gpt2", f"{NO_HOOKS}their decoder does not keep its layers as `layers`"),
        ("bloom", f"{NO_HOOKS}their attention layers do not support other attention functions"),
        ("kimi_linear", f"{NO_HOOKS}their layers have keys and values of different shapes"),
    ],
    mlx=[
        *((name, NO_HOOKS) for name in ("mamba", "jamba", "recurrent_gemma", "baichuan_m1")),
        *(
            ("rwkv7", NO_HOOKS),
            ("ministral3", "by column"),
            ("deepseek_v32", "that branches"),
        ),
    ],
)
def test_types_that_cannot_branch_are_refused_by_name(engine, name, reason):
    outcome, message = attempt(engine.families, name)
    assert outcome == "refused"
    assert name in message
    assert reason in message
    assert "\n" not in message


FULL = {"layer_types": ["full_attention"] * LAYERS}


@each(
    ("name", "settings", "lacking"),
    cuda=[
        ("lfm3", FULL, "Lfm3ShortConv"),
        ("granitemoehybrid", FULL, "GraniteMoeHybridMambaLayer"),
        ("gemma2", FULL, "sliding_attention"),
    ],
    mlx=[
        (
            "granitemoehybrid",
            {"layer_types": ["attention"] * LAYERS},
            "GraniteMoeHybridMamba2Mixer",
        ),
        # The layers have the same classes; their caches differ.
        ("gemma3_text", {"sliding_window_pattern": 1}, "RotatingKVCache"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "Qwen3MoeSparseMoeBlock"),
    ],
)
def test_a_tiny_model_that_lacks_a_kind_of_layer_is_not_tried(
    engine, monkeypatch, name, settings, lacking
):
    families = engine.families
    assert not families.missing_layers(name, families.configuration(name))
    own = families.OVERRIDES.get(name, {}) | settings
    monkeypatch.setitem(families.OVERRIDES, name, own)
    outcome, reason = attempt(families, name)
    assert outcome == "not tried"
    assert lacking in reason


PROMPT = [5, 17, 3, 22, 8, 11, 20]
# Texts at higher temperatures repeat nothing in 200 tokens of some models.
GREEDY, SEEDED = SamplingConfig(), SamplingConfig(temperature=0.5, seed=7)
READ_LAYERS = (0, LAYERS // 2)


def fit(engine, target, drafter, texts):
    """Fit a drafter to texts of the target."""
    require("torch")
    from fitted_drafters import fit_drafter

    responses = [Response(prompt_ids=tuple(PROMPT), response_ids=tuple(text)) for text in texts]
    *known, layers = engine.outputs_of_layers(target, READ_LAYERS, responses)
    fit_drafter(drafter, responses, *known, layers=layers)


def check_texts(backend, texts, methods, budgets):
    """Every method gives the texts, and drafts are accepted."""
    for (sampling, text), method, budget in itertools.product(texts.items(), methods, budgets):
        settings = {"method": method, "budget": budget, "sampling": sampling}
        steps = steps_of(backend, PROMPT, DecodeConfig(max_tokens=len(text), **settings))
        assert tokens_of(steps) == text, (method, budget)
        efficiency = (len(text) - 1) / (len(steps) - 1)
        # A fitted drafter knows these texts, which seldom repeat what `suffix` could copy.
        assert efficiency > (1 if method == "suffix" else 1.3), (method, budget)


@pytest.mark.sample(3)
@each(
    ("name",),
    cuda=[*COMMON["cuda"], "llama", "qwen2", "qwen3_moe", "mistral"],
    mlx=[*COMMON["mlx"], "qwen3_moe"],
)
def test_drafted_text_is_the_frameworks_own(engine, tmp_path, name):
    target, drafter = write_pair(engine.families, tmp_path, name)
    expected = engine.plain_text(target, PROMPT, 40)
    check_texts(engine.load(target, drafter), {GREEDY: expected}, ["treeflash"], [64])


# Seconds for each, to train a drafter. `test_trees_of_recurrent_layers_are_plain_texts` compares
# logits, from which texts follow but for errors that grow over hundreds of tokens.
@pytest.mark.nightly
@each(("name",), **HYBRIDS)
def test_long_drafted_texts_are_plain_ones(engine, tmp_path, name):
    target, drafter = write_pair(engine.families, tmp_path, name)
    plain, texts = engine.load(target), {}
    for sampling in (GREEDY, SEEDED):
        config = DecodeConfig(method="ar", max_tokens=200, sampling=sampling)
        texts[sampling] = generate(plain, PROMPT, config)
    assert texts[GREEDY] == engine.plain_text(target, PROMPT, 200)
    fit(engine, target, drafter, texts.values())
    check_texts(engine.load(target, drafter), texts, METHODS[1:], (16, 64))


@pytest.mark.sample(1)
@each(("name",), mlx=["mamba", "jamba", "recurrent_gemma", "rwkv7", "baichuan_m1"])
def test_a_type_without_trees_decodes_plainly(engine, tmp_path, name):
    engine.families.write(tmp_path, name)
    text = generate(engine.load(tmp_path), PROMPT, DecodeConfig(method="ar", max_tokens=12))
    assert text == engine.plain_text(tmp_path, PROMPT, 12)
