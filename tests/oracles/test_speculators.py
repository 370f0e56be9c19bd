"""Random checkpoints that speculators saves, against what its own forward passes compute.

`tox -e oracles` runs it in a separate environment.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("speculators")

import torch
from mtp_pairs import write_mtp_pair
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.registry import loader
from treeflash.testing.models import save, write_target

TOLERANCE = 2e-5
DRAFT_VOCAB_SIZE, MASK = 16, 7
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
LENGTH = 9  # committed tokens of these; the next one is the root
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 3,
    "use_sliding_window": True,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dflash": ("DFlashDraftModel", {}),
    "dflash, d2t": ("DFlashDraftModel", {"draft_vocab_size": DRAFT_VOCAB_SIZE}),
    "dflash, windows": ("DFlashDraftModel", SLIDING),
    "dflash, the anchor predicts": ("DFlashDraftModel", {"sample_from_anchor": True}),
    "dflash2": ("DFlash2DraftModel", {"selector_top_k": 4, "conv_group_size": 8}),
    "dflash2, windows": (
        "DFlash2DraftModel",
        {"selector_top_k": 4, "conv_group_size": 8} | SLIDING,
    ),
    **{
        f"dspark, {head}": ("DSparkDraftModel", {"markov_head_type": head, "markov_rank": 8})
        for head in ("vanilla", "gated", "rnn")
    },
    "dspark, the anchor predicts nothing": (
        "DSparkDraftModel",
        {"markov_rank": 8, "sample_from_anchor": False},
    ),
    "eagle3": ("Eagle3DraftModel", {"norm_before_residual": False, "ttt_steps": 3}),
    "eagle3, flags": (
        "Eagle3DraftModel",
        {
            "norm_before_residual": True,
            "norm_output": True,
            "fc_norm": True,
            "ttt_steps": 3,
            "draft_vocab_size": DRAFT_VOCAB_SIZE,
        },
    ),
    "eagle3, window": (
        "Eagle3DraftModel",
        {
            "norm_before_residual": False,
            "ttt_steps": 3,
            "layers": 1,
            "layer_types": ["sliding_attention"],
            "sliding_window": 3,
            "use_sliding_window": True,
        },
    ),
    "peagle": ("PEagleDraftModel", {"num_depths": 5}),
    "peagle, flags": (
        "PEagleDraftModel",
        {"num_depths": 4, "norm_before_residual": True, "norm_before_fc": True},
    ),
}


def save_random(folder: Path, target: Path, name: str, settings: dict[str, Any]) -> Any:
    """Save a random checkpoint as speculators does; returns its model."""
    settings = dict(settings)
    kind = name.removesuffix("DraftModel").lower()
    layers = 1 if kind == "eagle3" else settings.pop("layers", 2)
    of_layers = {key: settings.pop(key) for key in SLIDING if key in settings}
    shape = read_config(target)
    vocab_size = shape["vocab_size"]
    keys = "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim"
    config: PretrainedConfig = Qwen3Config(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        **{key: shape[key] for key in keys.split()},
        **of_layers,
    )
    size = settings.pop("draft_vocab_size", vocab_size)
    maps: dict[str, Tensor] = {}
    if size != vocab_size:
        chosen = torch.randperm(vocab_size)[:size].sort().values
        maps["d2t"] = chosen - torch.arange(size)
        maps["t2d"] = torch.isin(torch.arange(vocab_size), chosen)
    model: Any = getattr(import_module(f"speculators.models.{kind}"), name).from_training_args(
        config,
        **maps,
        draft_vocab_size=size,
        verifier_name_or_path=str(target),
        target_layer_ids=[1, 3],
        block_size=6,
        mask_token_id=MASK,
        draft_attn_impl="eager",
        **settings,
    )
    shared = {"embed_tokens.weight"} | (set() if maps else {"lm_head.weight"})  # the target's
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in shared or parameter_name.startswith("verifier_"):
            continue
        noise = 0.3 * torch.randn_like(parameter)
        parameter.data = 1 + noise / 3 if parameter_name.endswith("norm.weight") else noise
    if kind == "peagle":  # the mask's embedding is trained
        model.embed_tokens.weight.data[MASK] += 1
    model.save_pretrained(folder)
    return model.float().eval()


class HeadHasRunError(Exception):
    """The output head has run; what follows in a forward pass computes a loss."""


@torch.no_grad()
def run(model: Any, target: Path, patch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Return the inputs and the outputs of the output head in a model's forward pass."""
    ids = torch.tensor([TOKENS])
    verifier = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    outputs = verifier(ids, output_hidden_states=True)
    states = torch.cat([outputs.hidden_states[i] for i in (1, 3)], -1)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: Any, inputs: Any, output: Tensor) -> None:
        seen.append((inputs[0][0], output[0]))
        raise HeadHasRunError

    hook = model.lm_head.register_forward_hook(note)
    kind = type(model).__name__
    anchor = torch.zeros(1, len(TOKENS))
    anchor[0, LENGTH] = 1
    common = {
        "hidden_states": states,
        "verifier_last_hidden_states": outputs.hidden_states[-1],
        "document_ids": torch.zeros(1, len(TOKENS), dtype=torch.long),
    }
    shifted = torch.cat([ids[:, 1:], ids[:, :1]], 1)  # row i of EAGLE-3 has the token after it
    with suppress(HeadHasRunError):
        if kind == "Eagle3DraftModel":
            model(input_ids=shifted, ttt_steps=1, loss_mask=None, **common)
        elif kind == "PEagleDraftModel":  # one group of mask rows, after the root's row
            methods = model.config.speculators_config.proposal_methods
            depths = torch.arange(1, methods[0].speculative_tokens)
            rows = torch.arange(LENGTH), torch.full_like(depths, LENGTH - 1)
            group = torch.cat(rows), torch.cat([torch.zeros_like(rows[0]), depths])
            core = import_module("speculators.models.peagle.core")
            patch.setattr(core, "generate_cod_sample_indices", lambda **_: group)
            model(input_ids=shifted, **common)
        else:
            model(input_ids=ids, loss_mask=anchor, max_anchors=1, **common)
    hook.remove()
    return seen[0]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle") / "target"
    write_target(folder, "qwen3", seed=0)
    return folder


def log_softmax(x: Tensor) -> NDArray[np.float32]:
    return np.asarray(x.detach().float().log_softmax(-1))


def same(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Compare log probabilities; tokens that a drafter cannot propose have -inf in ours."""
    kept = np.isfinite(actual)
    assert (kept.sum(-1) == expected.shape[1]).all()
    np.testing.assert_allclose(actual[kept].reshape(expected.shape), expected, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_log_probs(
    backend: str,
    case: str,
    seed: int,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, settings = CASES[case]
    torch.manual_seed(seed)
    model = save_random(tmp_path / "drafter", target, name, settings)
    hidden, logits = run(model, target, monkeypatch)
    config = LoadConfig(device="cpu", dtype="float32")
    pair = loader(backend)(target, tmp_path / "drafter", config)
    previous = np.array(TOKENS[LENGTH : LENGTH + pair.drafter_config.depths], np.int32)
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend(TOKENS[:LENGTH])
        block = sequence.draft(TOKENS[LENGTH])
        if name == "Eagle3DraftModel":
            actual = pair.head.log_probs(block, previous[:1])
            same(actual, log_softmax(logits[LENGTH - 1 : LENGTH]))
            return
        if name == "PEagleDraftModel":
            same(pair.drafter.log_probs(block), log_softmax(logits[LENGTH - 1 :]))
            return
        first = pair.drafter_config.first_slot
        same(pair.drafter.log_probs(block), log_softmax(logits[first:]))
        if pair.head is None:
            return
        # Slot k is conditioned on the token before its prediction, and slot 1 on the root.
        tokens = torch.tensor([TOKENS[LENGTH : LENGTH + 6]])
        before = tokens if not first else torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
        actual = pair.head.log_probs(block, previous)
        if name == "DSparkDraftModel":
            embedded = model.markov_head.prev_embeddings(before)
            bias = model.markov_head.block_bias(
                prev_token_ids=before, hidden_states=hidden[None], prev_emb=embedded
            )
            same(actual, log_softmax((logits + bias[0])[first:]))
        if name == "DFlash2DraftModel":
            candidates = logits[None].topk(4, dim=-1).indices
            scores = model.candidate_selector.score_candidates(
                logits[None], hidden[None], before, candidates
            )[0]
            for depth, row in enumerate(range(first, 6)):
                tokens_ = candidates[0, row].numpy()
                mass = np.log(np.exp(log_softmax(logits[row])[tokens_]).sum())
                expected = log_softmax(scores[row]) + mass
                np.testing.assert_allclose(actual[depth, tokens_], expected, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_mtp(backend: str, seed: int, tmp_path: Path) -> None:
    """Qwen3.5's head, as speculators takes it out of the target's folder; the first depth."""
    target, _ = write_mtp_pair(tmp_path, "mtp", seed)
    save(target, read_config(target), read_tensors(target))  # in one file, as speculators reads it
    (target / "mtp.safetensors").unlink()
    module: Any = import_module("speculators.models.mtp")
    verifier = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model = module.MTPDraftModel.from_training_args(
        verifier.config.get_text_config(), verifier_name_or_path=str(target)
    )
    model.save_pretrained(tmp_path / "drafter")
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        states = verifier(ids, output_hidden_states=True).hidden_states[-1]
        logits, _, _ = model.float().eval()(input_ids=ids, hidden_states=states)
    config = LoadConfig(device="cpu", dtype="float32")
    pair: Any = loader(backend)(target, tmp_path / "drafter", config)
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend(TOKENS[:LENGTH])
        block = sequence.draft(TOKENS[LENGTH])
        actual = pair.head.log_probs(block, np.array(TOKENS[LENGTH : LENGTH + 1], np.int32))
    same(actual, log_softmax(logits[0][0, LENGTH - 1 : LENGTH]))
