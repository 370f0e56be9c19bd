"""Heads that read embeddings have features of images, at the target's rotary positions."""

from importlib import import_module
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from image_models import TABLES, picture, random_model, random_processors, save_published
from mtp_pairs import write_head
from parts import load_with_parts
from safetensors.torch import load_file
from transformers import Qwen3_5TextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.images import PromptPositions
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.registry import loader

CPU = LoadConfig(device="cpu", dtype="float32")
EAGLE = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}
AXES = {"rope_scaling": TABLES["parts"]["sections"]["rope_parameters"] | {"rope_type": "mrope"}}
KINDS = {
    "qwen3_5-mtp": ("qwen3_5", "mtp", {}),
    "qwen3_vl-eagle3": ("qwen3_vl", "eagle3", EAGLE | AXES),
    "gemma3-eagle3": ("gemma3", "eagle3", EAGLE),
}
PROMPT, PICTURE = "ab<image>cd", picture(1, 32, 48)
DRAFTED = 70, 5, 71
"""The root, a child and a grandchild."""


class Published:
    """A model of transformers, and a head for it whose rows are one causal pass of its layer."""

    def __init__(self, family, kind, settings, folder):
        self.model, self.kind, self.settings = random_model(family), kind, settings
        save_published(family, self.model, folder)
        self.head = write_head(folder / "head", folder, kind, 3, **settings)
        file = "mtp.safetensors" if kind == "mtp" else "head/model.safetensors"
        self.tensors = {
            name.removeprefix("mtp."): x for name, x in load_file(folder / file).items()
        }

    @torch.inference_mode()
    def log_probs(self, ids, images, drafted):
        """(drafted, vocabulary) log probabilities after each drafted token."""
        read = []  # the inputs of the first layers: embeddings, then features of EAGLE-3
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: read.append((args or [kwargs["hidden_states"]])[0][0]),
                with_kwargs=True,
            )
            for layer in self.model.get_decoder().layers[:4]
        ]
        inputs = {name: torch.from_numpy(x) for name, x in images.images[0].inputs.items()}
        types = torch.from_numpy(images.is_feature[None].astype(np.int64))
        out = self.model.base_model(
            input_ids=torch.tensor([ids]),
            **inputs,
            **({"token_type_ids": types} if images.whole else {"mm_token_type_ids": types}),
        )
        for hook in hooks:
            hook.remove()
        table = self.model.get_input_embeddings().weight
        embedded = table[torch.tensor(ids)].clone()
        embedded[torch.from_numpy(images.is_feature)] = read[0][images.is_feature]
        embedded = torch.cat([embedded[1:], table[torch.tensor(drafted)]])
        columns = np.arange(len(ids) + len(drafted) - 1)
        positions = np.tile(columns + images.shift, (3, 1))
        if images.positions is not None:
            positions[:, : len(ids)] = images.positions
        states = out.last_hidden_state[0]
        if self.kind != "mtp":
            states = torch.cat(read[1:], -1) @ self.tensors["fc.weight"].T
        run = self._mtp if self.kind == "mtp" else self._eagle
        made = []
        for n in range(len(drafted)):
            rows = len(ids) + n
            output, state = run(
                embedded[:rows], states, torch.from_numpy(positions[:, None, :rows])
            )
            states = torch.cat([states, state[None]])
            made.append(output.log_softmax(-1).numpy())
        return made

    def _mtp(self, embedded, states, positions):
        text = self.model.config.text_config.to_dict()
        layer = Qwen3_5DecoderLayer(Qwen3_5TextConfig(**text, attn_implementation="sdpa"), 1).eval()
        names = {x: f"layers.0.{x}" for x in layer.state_dict()}
        layer.load_state_dict({x: self.tensors[y] for x, y in names.items()})
        both = (
            self._norm("pre_fc_norm_embedding", embedded, 1),
            self._norm("pre_fc_norm_hidden", states, 1),
        )
        x = torch.cat(both, -1) @ self.tensors["fc.weight"].T
        rotation = self.model.get_decoder().rotary_emb(x[None], positions)
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()[None, None]
        last = layer(x[None], position_embeddings=rotation, attention_mask=mask)[0, -1]
        state = self._norm("norm", last, 1)
        return self.model.lm_head(state), state

    def _eagle(self, embedded, states, positions):
        sections = self.settings.get("rope_scaling", {}).get("mrope_section", [8, 0, 0])
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
        rotary = Qwen2VLRotaryEmbedding(
            SimpleNamespace(max_position_embeddings=512, rope_parameters=rope, head_dim=16)
        )
        normed = self._norm("midlayer.hidden_norm", states)
        y = torch.cat([self._norm("midlayer.input_layernorm", embedded), normed], -1)
        q, k, v = (self._linear(f"self_attn.{x}_proj", y).unflatten(-1, (-1, 16)) for x in "qkv")
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *rotary(y[None], positions))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = states + self._linear("self_attn.o_proj", attended[0].transpose(0, 1).flatten(1))
        y = self._norm("midlayer.post_attention_layernorm", x)
        inner = F.silu(self._linear("mlp.gate_proj", y)) * self._linear("mlp.up_proj", y)
        x = x + self._linear("mlp.down_proj", inner)
        return self._norm("norm", x[-1]) @ self.tensors["lm_head.weight"].T, x[-1]

    def _norm(self, name, x, offset=0):
        return F.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"] + offset, 1e-6)

    def _linear(self, name, x):
        return x @ self.tensors[f"midlayer.{name}.weight"].T


PAIRS = [(name, kind) for name in ("cuda", "mlx") for kind in KINDS]
ON_A_GPU = "cuda on a GPU", "qwen3_5-mtp"
"""Drafts as on a GPU, where rows without images are one function of tensors."""


@pytest.fixture(scope="module", params=[*PAIRS, ON_A_GPU], ids=str)
def pair(request, tmp_path_factory):
    """A published model with a head, the loaded pair, and a prompt with its log probabilities."""
    name, _, parts = request.param[0].partition(" ")
    kind = request.param[1]
    if name == "mlx":
        pytest.importorskip("mlx_vlm")
    transformers.logging.set_verbosity_error()
    family, *head = KINDS[kind]
    folder = tmp_path_factory.mktemp(kind)
    published = Published(family, *head, folder)
    with random_processors(family, import_module(f"treeflash_{name}.images")) as patch:
        if parts:
            backend = load_with_parts(patch, folder, published.head, cuda_graphs=True)
        else:
            backend = loader(name)(folder, published.head, CPU)
    assert not isinstance(backend.images, str), backend.images
    prompt = backend.images.encode(PROMPT, [PICTURE])
    return published, backend, prompt, published.log_probs(*prompt, DRAFTED)


def extend(session, prompt, size=1000):
    """Commit what is missing of a prompt, in chunks of about a size."""
    ids, images = prompt
    while (first := session.length) < len(ids):
        session.extend(ids[first : images.chunk_end(first, size)], images=images)


def error(backend, session, expected):
    """The largest difference from log probabilities after the drafted tokens."""
    block = session.draft(DRAFTED[0])
    actual = backend.head.log_probs(block, np.array(DRAFTED, np.int32))
    kept = np.isfinite(actual[0])
    return float(np.abs(actual[:, kept] - np.stack(expected)).max())


TOLERANCE, MISTAKE = 2e-3, 0.05


@pytest.mark.sample(2)
@pytest.mark.parametrize("size", [1000, 5, 1])
def test_drafts_are_those_of_the_published_head(pair, size):
    _, backend, prompt, expected = pair
    with SequenceSession(backend, drafts=True) as session:
        extend(session, prompt, size)
        assert error(backend, session, expected) < TOLERANCE


def test_forks_and_stored_states_draft_the_same(pair):
    """Of states that end in text and in an image, before and after the drafter has read them."""
    _, backend, prompt, expected = pair
    ids, images = prompt
    for length in (images.images[0].first, images.images[0].first + 3):
        if images.whole and length > images.images[0].first:
            continue
        for is_read in (False, True):
            with SequenceSession(backend, drafts=True) as session:
                extend(session, (ids[:length], images))
                if is_read:
                    session.draft(9)
                stored = backend.open(64, drafts=True)
                stored.append(ids[:length], session.state.export(0, length, end=True).arrays())
                for state in (session.state.fork(length, 64), stored):
                    continued = SequenceSession(backend, drafts=True)
                    continued.state.close()
                    continued.state = state
                    extend(continued, prompt)
                    assert error(backend, continued, expected) < TOLERANCE


def test_later_drafts_are_at_shifted_positions(pair):
    """A first draft may come late: no row is computed while drafting pauses."""
    published, backend, prompt, _ = pair
    longer = backend.images.encode(PROMPT + "PQR", [PICTURE])
    expected = published.log_probs(*longer, DRAFTED)
    for drafts_before in (True, False):
        with SequenceSession(backend, drafts=True) as session:
            extend(session, prompt)
            for token in (80, 81, 82):
                if drafts_before:
                    session.draft(token)
                session.verify(DraftTree.root_only(token))
                session.commit(np.zeros(1, np.int32))
            assert error(backend, session, expected) < TOLERANCE


def forget_features(backend):
    package = type(backend).__module__.partition(".")[0]
    module = import_module(f"{package}.mtp_head")
    return module, "merge_features", lambda embedded, rows: embedded


def take_columns(_):
    return PromptPositions, "rows", lambda _, first, end: np.tile(np.arange(first, end), (3, 1))


def take_one_axis(_):
    positions = PromptPositions.rows
    return PromptPositions, "rows", lambda *args: positions(*args)[[0, 0, 0]]


def test_planted_faults_change_the_drafts(pair):
    _, backend, prompt, expected = pair
    has_axes = prompt[1].positions is not None
    for fault in (forget_features, *((take_columns, take_one_axis) if has_axes else ())):
        with (
            SequenceSession(backend, drafts=True) as session,
            pytest.MonkeyPatch.context() as patch,
        ):
            extend(session, prompt)
            patch.setattr(*fault(backend))
            assert error(backend, session, expected) > MISTAKE, fault


@pytest.mark.sample(1)
def test_text_is_that_of_plain_decoding_in_a_batch(pair):
    _, backend, prompt, _ = pair
    prompts = [
        prompt,
        backend.images.encode("<image>ef<image>gh", [picture(1), picture(2, 24, 16)]),
    ]
    prompts.append(([1, *map(ord, "abcdabcd")], None))

    def texts(method, size=1000):
        decode = DecodeConfig(method=method, budget=12, max_tokens=12)
        config = SchedulerConfig(prefill_chunk=size, lone_prefill_chunk=size)
        found = {Request(prompt_ids=ids, images=x, config=decode): [] for ids, x in prompts}
        for request, step in Scheduler(backend, config).decode(found):
            found[request] += step.tokens
        return list(found.values())

    plain = texts("ar")
    assert texts("treeflash") == plain
    assert texts("treeflash-chain", 5) == plain
