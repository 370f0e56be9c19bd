"""Drafters that read their targets' states: backends against the reference and transformers.

They are heads that draft depth by depth, MTP and EAGLE-3, and P-EAGLE. Layers of transformers have
experts and latents; DeepSpec's EAGLE-3 heads for Gemma 4 are made of parts of its layers.
"""

from dataclasses import replace
from functools import cache, partial
from importlib import import_module

import numpy as np
import pytest
from mtp_pairs import SETTINGS, VARIANTS, assert_rows_are_paths, write_mtp_pair, write_peagle_pair
from published_drafters import BACKENDS, FLOAT32, TOLERANCE
from recordings import recording
from scheduled_texts import assert_plain_texts

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.sampling import Noise
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.drafters import mtp_heads
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError, ConfigError
from treeflash.hub import models
from treeflash.reference import mtp_head
from treeflash.registry import loader
from treeflash.testing.comparisons import generate, steps_of, tokens_of
from treeflash.testing.models import edit_config, normal, save
from treeflash.testing.pairs import each_value, pairwise
from treeflash.testing.states import check_storage, tables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch as safetensors
from transformers.models.gemma4 import modeling_gemma4 as gemma4

KINDS = "peagle", *SETTINGS
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 1, 2, 3, 5, 8, 13, 21, 12, 11, 10, 9])


@pytest.fixture(scope="module")
def load_pair(tmp_path_factory):
    """Load a kind of pair in a backend, once for all tests."""

    @cache
    def load(backend, kind):
        pytest.importorskip(BACKENDS[backend])
        if backend == "cuda" and "latents" in kind:
            pytest.skip("the cuda backend runs no target with latent attention")
        write = write_peagle_pair if kind == "peagle" else partial(write_mtp_pair, kind=kind)
        return loader(backend)(*write(tmp_path_factory.mktemp(kind)), FLOAT32)

    return load


def log_probs(pair, block, path):
    return pair.head.log_probs(block, np.array(path, np.int32))


@pytest.mark.sample(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_siblings_are_invisible_and_rows_of_drafts_are_forgotten(backend, kind, load_pair):
    """Every row of a table has the log probabilities of its path alone."""
    pair, options = load_pair(backend, kind), TableOptions(m=5, k=4)
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend(PROMPTS[0])
        table = tables(pair, sequence.draft(5, 4), options)
        for _ in range(2):  # the second time over what the first has left
            block = sequence.draft(5, 4)
            assert_rows_are_paths(table, 5, partial(log_probs, pair, block))
            assert len(table.tokens[1]) == 5
            table = tables(pair, block, options)


def test_visible_siblings_fail(load_pair, monkeypatch):
    monkeypatch.setattr(mtp_head.np, "eye", lambda n, dtype: np.ones((n, n), dtype))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_siblings_are_invisible_and_rows_of_drafts_are_forgotten("reference", "mtp", load_pair)


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("backend", "kind", "noisy"), pairwise(("cuda", "mlx"), (*KINDS, *VARIANTS), (False, True))
)
def test_tables_of_several_sequences_equal_the_reference(backend, kind, noisy, load_pair):
    pair, reference = load_pair(backend, kind), load_pair("reference", kind)

    def made(pair):
        sequences = [SequenceSession(pair, drafts=True) for _ in PROMPTS]
        for sequence, prompt in zip(sequences, PROMPTS, strict=True):
            sequence.extend(prompt)
        found = []
        # The second comes after different new tokens. For these two no choice is a near-tie.
        for root in (4, 6) if kind == "peagle" else (4, 17):
            blocks = pair.drafter.draft([(s.state, root) for s in sequences], 4)
            samplings = [SamplingConfig(temperature=1.0, seed=i) for i in range(len(sequences))]
            after = [s.length + np.arange(1, 5, dtype=np.int32) for s in sequences]
            noise = Noise.from_positions(list(zip(samplings, after, strict=True)))
            options = TableOptions(m=5, k=4, noise=noise if noisy else None)
            make = pair.head.transitions if pair.head else pair.drafter.marginals
            found += make(blocks, options)
            for n, sequence in enumerate(sequences, 1):
                sequence.extend([root, *range(n)])
        return found

    for actual, expected in zip(made(pair), made(reference), strict=True):
        assert actual.depths == 4
        np.testing.assert_array_equal(actual.tokens, expected.tokens)
        np.testing.assert_array_equal(actual.next_row, expected.next_row)
        np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=TOLERANCE)


@pytest.mark.sample(6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_after_drafts_forks_and_truncations(backend, kind, load_pair):
    """A shorter state with other tokens drafts as a fresh one: its rows are the target's."""
    pair = load_pair(backend, kind)
    first, second = list(PROMPTS[2]), [7, 3]
    with SequenceSession(pair, drafts=True) as old:
        for stop in (3, 5, 6):
            old.extend(first[old.length : stop])
            old.draft(first[stop])
        old.state.snapshot()
        old.extend(first[6:])
        old.draft(2)
        forks = [old.state.fork(length, 64) for length in (6, len(first))]
        old.state.truncate(6)
        for state, length in zip([*forks, old.state], (6, len(first), 6), strict=True):
            session = SequenceSession(pair, drafts=True)
            session.state = state
            session.extend(second)
            with SequenceSession(pair, drafts=True) as fresh:
                fresh.extend([*first[:length], *second])
                table, expected = (
                    tables(pair, x.draft(4, 4), TableOptions(m=5, k=4)) for x in (session, fresh)
                )
                np.testing.assert_array_equal(table.tokens, expected.tokens)
                np.testing.assert_allclose(table.log_probs, expected.log_probs, atol=TOLERANCE)
                rows, expected_rows = (
                    x.drafter.export(0, x.drafter.length) for x in (state, fresh.state)
                )
                for name, x in expected_rows.items():
                    np.testing.assert_allclose(rows[name], x, atol=TOLERANCE)


@pytest.mark.sample(6)
@pytest.mark.parametrize(("backend", "kind", "read"), pairwise(BACKENDS, KINDS, (11, 0)))
def test_stored_states_continue_bit_for_bit(backend, kind, read, load_pair):
    check_storage(load_pair(backend, kind), read=read)


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("backend", "kind", "temperature"), each_value(BACKENDS, KINDS, (0.0, 1.0))
)
def test_texts_equal_plain_decoding(backend, kind, temperature, load_pair):
    pair = load_pair(backend, kind)
    tree, chain = ("treeflash", "treeflash-chain") if pair.head else ("ddtree", "dflash")
    drafting = (tree, 12), (chain, 5)
    assert_plain_texts(pair, PROMPTS, *drafting, temperature=temperature, max_tokens=12)


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_long_prompts_run_in_chunks(backend, load_pair, monkeypatch):
    pair = load_pair(backend, "peagle")

    def drafted():
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(PROMPTS[2])
            return pair.drafter.log_probs(sequence.draft(3))

    expected = drafted()
    monkeypatch.setattr(pair.drafter, "chunk", 4)
    np.testing.assert_allclose(drafted(), expected, atol=TOLERANCE)


def test_methods_of_block_drafters_are_refused(load_pair):
    message = "with an MTP or EAGLE-3 head use method treeflash"
    for method in ("dflash", "ddtree"):
        with pytest.raises(ConfigError, match=message):
            steps_of(load_pair("reference", "eagle3"), [1, 2], DecodeConfig(method=method))
    for backend in BACKENDS:
        drafter = load_pair(backend, "eagle3").drafter
        for refused in (lambda d: d.marginals([0], TableOptions(k=4)), lambda d: d.log_probs(0)):
            with pytest.raises(ConfigError, match=message):
                refused(drafter)


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("eagle3", {"mystery": 3}, {}, "mystery = 3 is not supported"),
        ("eagle3", {}, {"draft_window": 8}, "draft_window is not supported with MTP"),
        ("peagle", {}, {"draft_window": 64}, "draft_window is not supported"),
        ("peagle", {"mask_token_id": 24}, {}, "mask token 24 is outside the vocabulary of 24"),
    ],
)
def test_what_is_refused_at_load(kind, changes, options, message, tmp_path):
    write = write_peagle_pair if kind == "peagle" else partial(write_mtp_pair, kind=kind)
    target, head = write(tmp_path)
    edit_config(head, lambda config: config.update(changes))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        loader("reference")(target, head, replace(FLOAT32, **options))


def test_a_head_in_a_separate_folder(tmp_path):
    """The tensors alone, as the one file of the original model that has them."""
    target, _ = write_mtp_pair(tmp_path, "mtp")
    (tmp_path / "sidecar").mkdir()
    for name in ("config.json", "mtp.safetensors"):
        (tmp_path / "sidecar" / name).write_bytes((target / name).read_bytes())
    pair = loader("reference")(target, tmp_path / "sidecar", FLOAT32)
    assert pair.drafter_config.head == "mtp"


def test_norms_stay_float32(tmp_path):
    """Norms of single features do, too: PyTorch's kernel takes no weights in half precision."""
    torch = pytest.importorskip("torch")
    config = LoadConfig(device="cpu", dtype="bfloat16", exact=False)
    pair = loader("cuda")(*write_mtp_pair(tmp_path, "eagle3-flags"), config)
    norms = {name: x for name, x in pair.drafter_model.state_dict().items() if "norm" in name}
    assert {"norm.weight", "fc_norm.0.weight"} <= norms.keys()
    assert {x.dtype for x in norms.values()} == {torch.float32}


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_the_biases_of_routers_stay_float32(backend, tmp_path):
    """They differ by little: rounded, other experts would run for most tokens."""
    pytest.importorskip(BACKENDS[backend])
    config = LoadConfig(device="cpu", dtype="bfloat16", exact=False)
    target, head = write_mtp_pair(tmp_path, "glm")
    pair = loader(backend)(target, head, config)
    stored = read_tensors(head)["model.layers.4.mlp.gate.e_score_correction_bias"]
    assert pair.drafter_model.layer.mlp.gate.correction.bias.tolist() == stored.tolist()


def test_own_head_is_the_drafter_of_last_resort(tmp_path):
    target, _ = write_mtp_pair(tmp_path, "mtp")
    assert models.resolve_drafter("self", str(target)) == target
    assert models.resolve_drafter(None, str(target)) == target
    (target / "mtp.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no MTP head"):
        models.resolve_drafter("self", str(target))
    with pytest.raises(CheckpointError, match="no published drafter is known"):
        models.resolve_drafter(None, str(target))


def test_state_nbytes_covers_the_states(load_pair):
    pair = load_pair("reference", "mtp")
    config = pair.drafter_config
    assert isinstance(config, mtp_heads.MtpConfig)
    columns = 10 + config.scratch_rows
    size = 2 * config.num_key_value_heads * config.head_dim + config.hidden_size
    plain = pair.state_nbytes(10, drafts=False)
    assert pair.state_nbytes(10, drafts=True) - plain == 4 * columns * size
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend(PROMPTS[0])
        sequence.draft(5)
        rows = len(PROMPTS[0]) * size - (size - config.hidden_size)  # but the root's row
        assert sequence.state.drafter.nbytes == 4 * rows


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_the_size_of_weights_has_a_vocabulary_of_the_heads_own(backend, tmp_path):
    pytest.importorskip(BACKENDS[backend])
    target, head = write_mtp_pair(tmp_path, "eagle3")
    pair = loader(backend)(target, head, FLOAT32)
    size = pair.weights_bytes
    pair.drafter_model.own.lm_head = None
    stored = read_tensors(head)["lm_head.weight"]
    assert size - pair.weights_bytes == 4 * stored.size > 0


def test_the_budget_auto_learns_the_price_of_a_depth(load_pair):
    pair = load_pair("reference", "eagle3")
    config = DecodeConfig(method="treeflash", budget="auto", max_tokens=24)
    plain = generate(pair, PROMPTS[0], replace(config, method="ar"))
    # Plain decoding is slow, so a depth is nearly free; then fast, so that none pays.
    for seconds, pays in ((10.0, True), (1e-6, False)):
        budgets = AdaptiveBudgets(VerifyCosts({1: seconds, 8: seconds, 16: seconds}))
        budget = budgets.get("treeflash", pair)
        budget.pace(1).depth_s.append(0.01)
        with recording(pair.drafter, "draft") as drafts:
            steps = list(decode(pair, Request(prompt_ids=PROMPTS[0], config=config), budgets))
        _, depths = drafts[0]
        assert depths == (8 if pays else 1)
    assert tokens_of(steps) == plain


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
