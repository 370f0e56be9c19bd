"""Exact mode: a sequence's logits are bitwise equal whatever is computed together with them."""

import json

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import write_target

require("torch")

import torch
from torch.nn import functional as F
from treeflash_cuda import exact
from treeflash_cuda.backend import load

DTYPES = ["bfloat16", "float16"]


def load_exact(folder, dtype="bfloat16"):
    return load(folder, None, LoadConfig(device="cpu", dtype=dtype, exact=True))


def write(folder, family="llama", **settings):
    write_target(folder, family, seed=1)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write(tmp_path_factory.mktemp("target"))


def random_tree(rng, nodes, spread):
    parents = [-1, *(int(rng.integers(max(0, i - spread), i)) for i in range(1, nodes))]
    return DraftTree.from_parents(
        rng.integers(0, 24, nodes).astype(np.int32), np.array(parents, np.int32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 100, 127, 128, 300])
def test_every_node_has_the_logits_of_plain_decoding(target, dtype, length):
    backend, rng = load_exact(target, dtype), np.random.default_rng(length)
    prefix = rng.integers(0, 24, length).tolist()
    for nodes, spread in ((2, 1), (17, 3), (64, 64), (250, 4)):
        tree = random_tree(rng, nodes, spread)
        with SequenceSession(backend) as branched, SequenceSession(backend) as plain:
            branched.extend(prefix)
            plain.extend(prefix[:1])
            for token in prefix[1:] if nodes == 17 else ():
                plain.logits(DraftTree.root_only(token))
                plain.commit(np.zeros(1, np.int32))
            if nodes != 17 and length > 1:
                plain.extend(prefix[1:])
            logits = branched.logits(tree)
            for node in np.flatnonzero(tree.ancestor_mask()[np.argmax(tree.depths)]):
                (alone,) = plain.logits(DraftTree.root_only(int(tree.tokens[node])))
                np.testing.assert_array_equal(alone, logits[node])
                plain.commit(np.zeros(1, np.int32))
