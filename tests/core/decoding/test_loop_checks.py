"""What is refused before decoding, and errors in its middle."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
from fake_models import DRAFTING, PROMPT, SCRIPT, FakeHead, config_of, run, scripted

from treeflash.decoding import Request, check, decode
from treeflash.errors import ConfigError, NumericalError, PromptError, UnsupportedModelError
from treeflash.testing.comparisons import tokens_of


class TestChecks:
    """All of them come before the iterator is asked for its first step."""

    @pytest.mark.parametrize("method", DRAFTING)
    def test_no_drafter(self, method):
        backend = scripted(SCRIPT)
        backend.drafter_config = backend.head = None
        with pytest.raises(ConfigError) as caught:
            decode(backend, Request(prompt_ids=PROMPT, config=config_of(method=method)))
        assert str(caught.value) == (
            f"method {method} needs a drafter and none was loaded; load a drafter (--drafter), "
            "or use method suffix or ar"
        )

    @pytest.mark.parametrize("method", ["treeflash", "treeflash-chain"])
    def test_no_head(self, method):
        backend = scripted(SCRIPT)
        backend.head = None
        with pytest.raises(ConfigError) as caught:
            decode(backend, Request(prompt_ids=PROMPT, config=config_of(method=method)))
        assert str(caught.value) == (
            f"method {method} needs an AR head, and the loaded drafter has no AR head; "
            "use method ddtree or dflash"
        )

    def test_what_works_with_less(self):
        backend = scripted(SCRIPT)
        backend.head = None
        for method in ("ar", "dflash", "ddtree"):
            assert tokens_of(run(backend, method=method, max_tokens=9)) == SCRIPT[4:13]
        backend.drafter_config = None
        assert tokens_of(run(backend, method="ar", max_tokens=9)) == SCRIPT[4:13]

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "the prompt is empty; give at least one token"),
            (
                [1] * 20,
                "the prompt has 20 tokens and the target's limit is 20, new tokens included; "
                "shorten the prompt",
            ),
            (
                [1] * 21,
                "the prompt has 21 tokens and the target's limit is 20, new tokens included; "
                "shorten the prompt",
            ),
            *(
                (
                    prompt,
                    "the prompt has token ids outside the target's vocabulary of 100; "
                    "was it encoded with another model's tokenizer?",
                )
                for prompt in ([5, 100], [-1, 5])
            ),
        ],
    )
    @pytest.mark.parametrize("entry", [decode, check])
    def test_bad_prompts(self, entry, prompt, message):
        with pytest.raises(PromptError) as caught:
            entry(
                scripted(SCRIPT, max_positions=20), Request(prompt_ids=prompt, config=config_of())
            )
        assert str(caught.value) == message

    @pytest.mark.parametrize("entry", [decode, check])
    def test_a_target_that_runs_no_trees(self, entry):
        """Loading a drafter checks it too; copies need no drafter."""
        backend = scripted(SCRIPT)
        backend.check_trees = Mock(side_effect=UnsupportedModelError("no trees"))
        entry(backend, Request(prompt_ids=PROMPT, config=config_of(method="ar")))
        with pytest.raises(UnsupportedModelError, match="no trees"):
            entry(backend, Request(prompt_ids=PROMPT, config=config_of(method="suffix")))

    def test_a_prompt_of_one_token_and_of_extreme_ids(self):
        assert tokens_of(run(scripted(SCRIPT), [99], max_tokens=3)) == SCRIPT[1:4]
        assert tokens_of(run(scripted(SCRIPT), [0, 99], max_tokens=3)) == SCRIPT[2:5]

    def test_damaged_target(self):
        backend = scripted(SCRIPT)
        backend.logits = lambda sequence: np.full(100, np.nan if len(sequence) > 5 else 1)
        steps = decode(backend, Request(prompt_ids=PROMPT, config=config_of()))
        assert next(steps).tokens == (0,)
        with pytest.raises(NumericalError, match="not finite"):
            next(steps)

    @pytest.mark.parametrize("token", [100, -1])
    def test_a_head_that_drafts_an_unknown_token(self, token):
        backend = scripted(SCRIPT)
        drafted = backend.propose(PROMPT, 1, 2)
        drafted.tokens[2] = [SCRIPT[6], token]
        backend.head = FakeHead(lambda *_: drafted)
        with pytest.raises(ConfigError, match=f"drafted the token {token}, .* has 100 tokens"):
            run(backend, method="treeflash")
        drafted.log_probs[2, :, 1] = -np.inf  # the child is absent
        assert tokens_of(run(backend, method="treeflash", max_tokens=3)) == SCRIPT[4:7]
