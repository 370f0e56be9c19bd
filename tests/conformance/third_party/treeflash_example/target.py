"""A Llama target."""

import numpy as np

from treeflash.decoding.backend_base import OneByOneVerifier
from treeflash.drafters.backbone import inverse_frequencies, rope_parameters
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import UnsupportedModelError
from treeflash_example.layer import Layer, Weights, rms_norm


class Target:
    def __init__(self, folder):
        config = read_config(folder)
        if config["model_type"] != "llama":
            raise UnsupportedModelError(
                f"the example backend runs Llama targets, not {config['model_type']!r}"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(
                f"the example backend runs the activation silu, not {config['hidden_act']!r}"
            )
        self.weights = Weights(folder, read_tensors(folder))
        self.embeddings = self.weights["model.embed_tokens.weight"]
        tied = config.get("tie_word_embeddings", False) and "lm_head.weight" not in self.weights
        self.lm_head = self.embeddings if tied else self.weights["lm_head.weight"]
        self.hidden_size, self.vocab_size = config["hidden_size"], config["vocab_size"]
        self.max_positions = config["max_position_embeddings"]
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", heads)
        head_dim = config.get("head_dim") or self.hidden_size // heads
        inv_freq, scale = inverse_frequencies(rope_parameters(config), head_dim)
        self.kv_shape = 2, kv_heads, 0, head_dim
        self.eps = config["rms_norm_eps"]
        shape = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "eps": self.eps,
            "inv_freq": inv_freq,
            "scale": scale,
        }
        self.layers = [
            Layer(self.weights, f"model.layers.{n}.", **shape)
            for n in range(config["num_hidden_layers"])
        ]

    def new_cache(self):
        return [np.zeros(self.kv_shape, np.float32) for _ in self.layers]

    def logits(self, x):
        return rms_norm(x, self.weights["model.norm.weight"], self.eps) @ self.lm_head.T


class Verifier(OneByOneVerifier):
    def __init__(self, target, layer_ids):
        self.target, self.layer_ids = target, layer_ids

    def forward(self, state, tree):
        x, positions = self.target.embeddings[tree.tokens], tree.positions(state.length)
        mask = np.ones((len(tree), state.length), np.bool_)
        mask = np.concatenate([mask, tree.ancestor_mask()], 1)
        new, outputs = [], []
        for layer, cached in zip(self.target.layers, state.kv_cache.layers, strict=True):
            x, kv_cache = layer(x, positions, cached, mask)
            new.append(kv_cache)
            outputs.append(x)
        return self.target.logits(x), (new, outputs)

    def commit_one(self, state, found, path):
        new, outputs = found
        state.kv_cache.append(new, path)
        if state.drafter:
            features = [outputs[n][path] for n in self.layer_ids]
            state.context.append(np.concatenate(features, -1))
