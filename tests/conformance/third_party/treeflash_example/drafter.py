"""A DFlash drafter, and the TreeFlash head."""

import numpy as np

from treeflash.decoding.backend_base import OneByOneDrafter, OneByOneHead
from treeflash.decoding.logit_tables import head_table, log_softmax, marginal_table
from treeflash.drafters.folder import read_file
from treeflash.drafters.loading import load_tensors, refuse_extensions
from treeflash_example.layer import Layer, rms_norm, silu


def check_drafter(config, vocabulary=()):
    """Refuse a drafter before it is downloaded, when its own tensors are not yet known."""
    refuse_extensions(config, "the example", vocabulary, supported=("input_scale",))


class DrafterModel:
    def __init__(self, folder, target):
        tensors = load_tensors(
            folder,
            read_file,
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            num_hidden_layers=len(target.layers),
        )
        check_drafter(tensors.config, tensors.vocabulary)
        self.config = config = tensors.config
        self.target = target
        self.weights, self.head_weights = tensors.backbone, tensors.head
        shape = {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "eps": config.rms_norm_eps,
            "inv_freq": config.inv_freq,
            "scale": config.rope_scale,
        }
        self.layers = [
            Layer(self.weights, f"layers.{n}.", **shape) for n in range(config.num_hidden_layers)
        ]

    def new_cache(self):
        shape = 2, self.config.num_key_value_heads, 0, self.config.head_dim
        return [np.zeros(shape, np.float32) for _ in self.layers]

    def norm(self, name, x):
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def logits(self, hidden):
        return self.norm("norm", hidden) @ self.target.lm_head.T


class Drafter(OneByOneDrafter):
    def __init__(self, model):
        self.model = model

    def read(self, state):
        """Keys and values of the positions committed since the last draft."""
        model, features = self.model, np.concatenate(state.context)
        state.context = []
        context = model.norm("hidden_norm", features @ model.weights["fc.weight"].T)
        positions = state.drafter.length + np.arange(len(context))
        state.drafter.append([layer.keys_and_values(context, positions) for layer in model.layers])

    def draft_one(self, state, root, depths):
        if state.context:
            self.read(state)
        model, config = self.model, self.model.config
        start = state.length
        tokens = np.array([root] + [config.mask_token_id] * (config.block_size - 1))
        x = model.target.embeddings[tokens] * np.float32(config.input_scale)
        positions = start + np.arange(config.block_size)
        distance = positions[:, None] - np.arange(start + config.block_size)
        for n, layer in enumerate(model.layers):
            window = config.sliding_windows[n] or np.inf
            mask = (np.abs(distance) < window) & ((distance >= 0) | (not config.causal[n]))
            x, _ = layer(x, positions, state.drafter.layers[n], mask)
        return root, x if depths is None else x[: 1 + depths]

    def marginals_one(self, block, options):
        return marginal_table(self.model.logits(block[1][1:]), options)

    def log_probs(self, block):
        return log_softmax(self.model.logits(block[1][1:]))


class Head(OneByOneHead):
    def __init__(self, model):
        self.model = model

    def transitions_one(self, block, options):
        root, hidden = block[0], block[1][1:]

        def score(slots, previous, tokens):
            return self.logits(hidden[slots], previous)[:, tokens]

        return head_table(self.model.logits(hidden), root, score, options)

    def log_probs(self, block, previous):
        return log_softmax(self.logits(block[1][1:], previous))

    def logits(self, hidden, previous):
        """(n, vocab) from (n, hidden_size) outputs and (n,) previous tokens."""
        model, weights = self.model, self.model.head_weights
        embedded = rms_norm(model.target.embeddings[previous], weights["norm.weight"], 1e-6)
        x = np.concatenate([embedded, model.norm("norm", hidden)], -1)
        if model.config.head == "swiglu":
            x = x @ weights["ug.weight"].T + weights["ug.bias"]
            up, gate = np.split(x, 2, -1)
            x = up * silu(gate)
        return model.logits(hidden + x @ weights["d.weight"].T)
