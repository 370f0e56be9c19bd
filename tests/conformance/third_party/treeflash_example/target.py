"""A Llama target, and what it does for one text."""

import numpy as np

from treeflash.decoding.sampling import choose
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
        self.weights = Weights(folder, read_tensors(folder))
        self.embeddings = self.weights["model.embed_tokens.weight"]
        tied = config["tie_word_embeddings"]
        self.lm_head = self.embeddings if tied else self.weights["lm_head.weight"]
        self.hidden_size, self.vocab_size = config["hidden_size"], config["vocab_size"]
        self.max_positions = config["max_position_embeddings"]
        self.kv_shape = 2, config["num_key_value_heads"], 0, config["head_dim"]
        self.eps = config["rms_norm_eps"]
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        shape = {
            "heads": config["num_attention_heads"],
            "kv_heads": config["num_key_value_heads"],
            "head_dim": config["head_dim"],
            "eps": self.eps,
            "inv_freq": theta ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"]),
        }
        self.layers = [
            Layer(self.weights, f"model.layers.{n}.", **shape)
            for n in range(config["num_hidden_layers"])
        ]

    def logits(self, x):
        return rms_norm(x, self.weights["model.norm.weight"], self.eps) @ self.lm_head.T


class Verifier:
    def __init__(self, target, layer_ids):
        self.target, self.layer_ids = target, layer_ids
        self.cache = [np.zeros(target.kv_shape, np.float32) for _ in target.layers]

    @property
    def length(self):
        return self.cache[0].shape[2]

    def prefill(self, token_ids, sampling, uniforms):
        rows = np.arange(len(token_ids))
        logits = self._run(np.array(token_ids), rows, rows[:, None] >= rows)
        return int(choose(logits[-1:], sampling, uniforms)[0]), self.commit(rows)

    def verify(self, tree, sampling, uniforms):
        return choose(self.logits(tree), sampling, uniforms)

    def logits(self, tree):
        return self._run(tree.tokens, tree.depths, tree.ancestor_mask())

    def commit(self, path):
        self.cache = [
            np.concatenate([old, new[:, :, path]], 2)
            for old, new in zip(self.cache, self.pending, strict=True)
        ]
        if not self.layer_ids:
            return None
        return np.concatenate([self.outputs[n][path] for n in self.layer_ids], -1)

    def keys_values(self):
        return np.stack(self.cache)

    def close(self):
        self.cache = self.pending = self.outputs = ()

    def _run(self, tokens, depths, mask):
        x, positions = self.target.embeddings[tokens], self.length + depths
        mask = np.concatenate([np.ones((len(tokens), self.length), np.bool_), mask], 1)
        self.pending, self.outputs = [], []
        for layer, cached in zip(self.target.layers, self.cache, strict=True):
            x, keys_values = layer(x, positions, cached, mask)
            self.pending.append(keys_values)
            self.outputs.append(x)
        return self.target.logits(x)
