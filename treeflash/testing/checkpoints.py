"""Every published form of a folder loads the same model; damaged folders are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from treeflash.config import DecodeConfig, Method, SamplingConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.backend_base import ONLY_BACKENDS
from treeflash.decoding.interfaces import Backend, Loader, SequenceState, TableOptions
from treeflash.decoding.probe import relative_difference
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_chain, build_tree
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import (
    CheckpointError,
    ConfigError,
    NumericalError,
    PromptError,
    UnsupportedModelError,
)
from treeflash.testing import models as tiny_models
from treeflash.testing.comparisons import (
    TOLERANCE,
    assert_close,
    assert_equal_drafter_caches,
    assert_equal_tables,
    generate,
    inspectable,
    paths,
    prompt_of,
    prompted,
    random_tokens,
    tokens_of,
)
from treeflash.testing.generations import DRAFTING, check_generation
from treeflash.testing.models import (
    DIALECTS,
    Config,
    Tensors,
    edit_config,
    save,
    write_dialect,
    write_target,
)
from treeflash.testing.pairs import (
    DRAFTER_SEED,
    EXAMPLES,
    LOAD,
    SAMPLINGS,
    TARGET_SEED,
    Pair,
    PairMaker,
    combine,
    load_reference,
)
from treeflash.testing.trees import (
    OPTIONS,
    check_transitions,
    draft,
    marginals,
    noise_of_depths,
    settled_prompt,
    transitions,
)

write_pair = partial(tiny_models.write_pair, seeds=(TARGET_SEED, DRAFTER_SEED))
"""Write a pair that a test may change."""


ROPE_SCALING: dict[str, dict[str, float]] = {
    "linear": {},
    "llama3": {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"original_max_position_embeddings": 64},
}
"""By type, the settings besides the factor."""


class CheckpointTests:
    families: ClassVar[tuple[str, ...]]

    def test_a_backend_has_the_members_of_the_protocol(self, backend: Backend) -> None:
        """What is missing would be found by whoever needs it, such as the command line."""
        members = {*Backend.__annotations__, *(x for x in vars(Backend) if not x.startswith("_"))}
        assert [name for name in sorted(members) if not hasattr(backend, name)] == []

    def test_dflash_folder_has_no_head(self, pair: PairMaker) -> None:
        dflash, treeflash = pair(drafter={"format": "dflash"}), pair()
        assert dflash.tested.head is None
        prompt = settled_prompt(treeflash.reference)
        backends = dflash.tested, treeflash.reference
        assert_equal_tables(*(marginals(backend, prompt, OPTIONS) for backend in backends))
        with pytest.raises(ConfigError, match="no AR head"):
            generate(dflash.tested, prompt, DecodeConfig(method="treeflash"))

    @pytest.mark.parametrize("format", ["dflash", "treeflash"])
    def test_sharded_folder(self, pair: PairMaker, format: str) -> None:
        config = DecodeConfig(method="ddtree", budget=12, max_tokens=6)
        check_generation(pair(drafter={"format": format, "sharded": True}), config)

    def test_sharded_target(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        logits = logits_of(load(target, drafter, LOAD))
        config, tensors = read_config(target), read_tensors(target)
        (target / "model.safetensors").unlink()
        save(target, config, tensors, sharded=True)
        assert_close(logits_of(load(target, drafter, LOAD)), logits)

    def test_default_target_layer_ids(self, pair: PairMaker) -> None:
        models = pair(target={"layers": 6}, drafter={"target_layer_ids": None})
        assert models.tested.drafter_config is not None
        assert models.tested.drafter_config.target_layer_ids == (1, 3)
        check_transitions(models)

    def test_default_target_layer_id_of_one_layer(self, pair: PairMaker) -> None:
        models = pair(target={"layers": 4}, drafter={"target_layer_ids": None, "layers": 1})
        assert models.tested.drafter_config is not None
        assert models.tested.drafter_config.target_layer_ids == (2,)
        check_transitions(models)

    def test_order_of_target_layer_ids(self, pair: PairMaker) -> None:
        check_transitions(pair(drafter={"target_layer_ids": (2, 0, 1)}))

    def test_tied_embeddings(self, pair: PairMaker, family: str) -> None:
        models = pair(family, target={"tied": True})
        check_transitions(models)
        assert_close(logits_of(models.tested), logits_of(models.reference))

    def test_an_output_head_that_is_stored_beside_tied_embeddings_counts(
        self, load: Loader, tmp_path: Path, family: str
    ) -> None:
        """As in transformers: the setting of such a folder is wrong."""
        write_target(tmp_path, family, seed=TARGET_SEED)
        expected = logits_of(load(tmp_path, None, LOAD))
        edit_config(tmp_path, lambda config: config.update(tie_word_embeddings=True))
        assert_close(logits_of(load(tmp_path, None, LOAD)), expected)

    @pytest.mark.parametrize("absent", ["rope_theta", "rope_parameters"])
    def test_rope_settings_in_either_form(
        self, load: Loader, tmp_path: Path, plain_family: str, absent: str
    ) -> None:
        """A folder has one form or the other; with neither read, the output is nonsense."""
        target, drafter = write_pair(tmp_path, plain_family)
        both = load(target, drafter, LOAD)
        edit_config(target, lambda config: config.pop(absent))
        edit_config(drafter, lambda config: config.pop(absent))
        one = load(target, drafter, LOAD)
        assert_close(logits_of(one), logits_of(both))
        assert one.drafter_config == both.drafter_config

    def test_settings_that_a_folder_leaves_out(
        self, load: Loader, tmp_path: Path, plain_family: str
    ) -> None:
        """The output head is then the folder's own, and the width of a head the usual one."""
        write_target(tmp_path, plain_family, seed=TARGET_SEED)
        expected = logits_of(load(tmp_path, None, LOAD))

        def leave_out(config: Config) -> None:
            del config["tie_word_embeddings"]
            if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
                del config["head_dim"]

        edit_config(tmp_path, leave_out)
        assert_close(logits_of(load(tmp_path, None, LOAD)), expected)

    def test_another_activation_is_computed_or_refused(
        self, load: Loader, tmp_path: Path, plain_family: str
    ) -> None:
        write_target(tmp_path, plain_family, seed=TARGET_SEED)
        logits = logits_of(load(tmp_path, None, LOAD))
        edit_config(tmp_path, lambda config: config.update(hidden_act="relu"))
        try:
            backend = load(tmp_path, None, LOAD)
        except (CheckpointError, UnsupportedModelError):
            return
        assert relative_difference(logits_of(backend), logits) > TOLERANCE

    def test_a_share_of_rotated_channels_that_the_family_ignores_changes_nothing(
        self, load: Loader, tmp_path: Path, plain_family: str
    ) -> None:
        write_target(tmp_path, plain_family, seed=TARGET_SEED)
        logits = logits_of(load(tmp_path, None, LOAD))
        edit_config(tmp_path, lambda config: config.update(partial_rotary_factor=0.5))
        assert_close(logits_of(load(tmp_path, None, LOAD)), logits)

    @pytest.mark.parametrize("kind", ROPE_SCALING)
    def test_scaled_rotary_embeddings_match_reference(
        self, load: Loader, tmp_path: Path, kind: str
    ) -> None:
        """Llama 3.1 has them, for example; a backend may refuse the target instead."""
        write_target(tmp_path, self.families[0], seed=TARGET_SEED)
        scaling = {"rope_type": kind, "factor": 4.0, **ROPE_SCALING[kind]}
        edit_config(tmp_path, lambda config: config["rope_parameters"].update(scaling))
        expected = logits_of(load_reference(tmp_path, None, LOAD))
        try:
            backend = load(tmp_path, None, LOAD)
        except (CheckpointError, UnsupportedModelError):
            return
        assert_close(logits_of(backend), expected)

    @pytest.mark.parametrize(
        "rewrite",
        [
            lambda config: config.update(config.pop("treeflash_config")),
            lambda config: config["dflash_config"].update(block_size=config.pop("block_size")),
            lambda config: config.update(layer_types=["full_attention"] * 2),
        ],
        ids=["head at top level", "block size inside", "layer types"],
    )
    def test_forms_of_drafter_configs(
        self, load: Loader, tmp_path: Path, rewrite: Callable[[Config], object]
    ) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        prompt = settled_prompt(Pair.load(load, target, drafter).reference)
        expected = transitions(load(target, drafter, LOAD), prompt, OPTIONS)
        edit_config(drafter, rewrite)
        assert_equal_tables(transitions(load(target, drafter, LOAD), prompt, OPTIONS), expected)

    def test_target_alone(self, load: Loader, models: Pair) -> None:
        backend = load(models.target, None, LOAD)
        assert backend.drafter_config is None
        assert backend.head is None
        prompt, config = prompt_of(backend, 0), DecodeConfig(method="ar", max_tokens=8)
        assert generate(backend, prompt, config) == generate(models.tested, prompt, config)
        with pytest.raises(ConfigError, match="needs a drafter"):
            decode(backend, Request(prompt_ids=prompt, config=DecodeConfig(method="ddtree")))

    def test_description(self, models: Pair) -> None:
        for name in ("vocab_size", "max_positions", "drafter_config"):
            assert getattr(models.tested, name) == getattr(models.reference, name)
        assert models.tested.dtype == "float32"
        assert models.tested.name
        assert models.tested.device


SETTINGS: dict[str, Any] = {
    "adapter": "a folder that does not exist",
    "compile": True,
    "device_map": "auto",
    "draft_bits": 4,
    "draft_window": 1,
    "kv_bits": 8,
    "threads": 1,
    "wired": True,
}


class SettingTests:
    families: ClassVar[tuple[str, ...]]

    @pytest.mark.parametrize("name", SETTINGS)
    def test_a_setting_is_refused_or_has_an_effect(
        self, load: Loader, models: Pair, name: str
    ) -> None:
        """Who asks for an adapter must not get the answers of the model without it."""
        if models.tested.name in ONLY_BACKENDS.get(name, ()):
            pytest.skip("what it changes are not the results")
        config = replace(LOAD, **{name: SETTINGS[name]})
        try:
            changed = load(models.target, models.drafter, config)
        except (ConfigError, CheckpointError):
            return
        results = [results_of(backend) for backend in (changed, models.tested)]
        assert any(not np.array_equal(*pair) for pair in zip(*results, strict=True))

    @pytest.mark.parametrize("sliding_window", [None, 7])
    @pytest.mark.parametrize("window", [1, 3, 100])
    def test_a_window_of_the_context_matches_reference(
        self, load: Loader, tmp_path: Path, window: int, sliding_window: int | None
    ) -> None:
        """The first few positions and the latest, within the windows of layers that have one."""
        folders = write_pair(tmp_path, self.families[0], drafter={"sliding_window": sliding_window})
        config, found = replace(LOAD, draft_window=window), []
        for loader in (load, load_reference):
            try:
                backend = loader(*folders, config)
            except ConfigError:
                pytest.skip("the backend lacks the setting")
            assert backend.drafter is not None
            sequences = [SequenceSession(backend, drafts=True) for _ in range(3)]
            roots = []
            for n, sequence in enumerate(sequences):  # the last one is shorter than what is seen
                sequence.draft(sequence.extend(WINDOW_PROMPT[: 7 - 3 * n]))
                roots.append((sequence.state, sequence.extend(WINDOW_PROMPT[2 * n :])))
            blocks = backend.drafter.draft(roots)
            log_probs = [*map(backend.drafter.log_probs, blocks)]
            inspectable(sequences[0].state).truncate(2)  # others are the first ones then
            sequences[0].extend(WINDOW_PROMPT * 2)
            found.append([*log_probs, backend.drafter.log_probs(sequences[0].draft(3))])
        for actual, expected in zip(*found, strict=True):
            assert_close(actual, expected)

    @pytest.mark.parametrize(
        ("block_size", "sliding_window", "causal", "yarn"),
        combine((2, 6), (None, 5), (None, False, True), (False, True)),
    )
    def test_settings_of_a_drafter_match_reference(
        self,
        load: Loader,
        tmp_path: Path,
        block_size: int,
        sliding_window: int | None,
        causal: bool | None,
        yarn: bool,
    ) -> None:
        shape = {"block_size": block_size, "sliding_window": sliding_window}
        folders = write_pair(tmp_path, self.families[0], drafter=shape)
        settings: dict[str, Any] = {"input_embedding_scale": 1.5}
        if causal is not None:
            settings["is_causal"] = causal
        if yarn:
            scaling = ROPE_SCALING["yarn"] | {"rope_theta": 1000.0, "factor": 4.0}
            settings["rope_parameters"] = {"rope_type": "yarn", **scaling}
        edit_config(folders[1], lambda config: config.update(settings))
        pair = Pair.load(load, *folders)
        sequences = [SequenceSession(backend, drafts=True) for backend in pair.both]
        for sequence in sequences:
            sequence.extend(WINDOW_PROMPT)
            sequence.draft(7)
            sequence.extend(WINDOW_PROMPT[2:])
        check_transitions(pair, length=12)
        log_probs = []
        for sequence in sequences:
            assert sequence.backend.drafter is not None
            log_probs.append(sequence.backend.drafter.log_probs(sequence.draft(3)))
        assert_close(*log_probs)
        assert_equal_drafter_caches(*(sequence.state for sequence in sequences))


WINDOW_PROMPT = [3, 4, 5, 6, 7, 8, 9]


def results_of(backend: Backend) -> list[NDArray[np.float32]]:
    """Compute the target's logits and the drafter's log probabilities after a prompt."""
    assert backend.drafter is not None
    (sequence,) = prompted([backend], prompt_of(backend) * 3, drafts=True)
    return [
        sequence.logits(DraftTree.root_only(1)),
        backend.drafter.log_probs(sequence.draft(1)),
    ]


def logits_of(backend: Backend) -> NDArray[np.float32]:
    """Compute logits after a prompt that is long enough for positions to matter."""
    (sequence,) = prompted([backend], prompt_of(backend) * 3)
    return sequence.logits(DraftTree.root_only(1))


AUTO: dict[str, Any] = {"max_tokens": 16, "budget": "auto"}
SAMPLED = SamplingConfig(temperature=1.0, seed=3)


class DrafterTests:
    dialects: ClassVar[tuple[str, ...]]
    families: ClassVar[tuple[str, ...]]

    def test_tables_of_a_dialect_match_reference(self, pair: PairMaker, dialect: str) -> None:
        models = pair(drafter={"dialect": dialect})
        prompt = random_tokens(np.random.default_rng(2), models.reference.vocab_size, 9)
        noise = noise_of_depths(models.reference, 0.8)
        for k, temperature, added in ((4, 1.0, None), (100, 0.7, None), (100, 0.7, noise)):
            options = TableOptions(k=k, temperature=temperature, noise=added)
            assert_equal_tables(*(marginals(backend, prompt, options) for backend in models.both))
        if models.reference.head is None:
            assert models.tested.head is None
            return
        sizes = ((3, 4, None, None), (100, 100, None, None), (4, 4, 8, 6))
        for (m, k, shortlist, rows), added in product(sizes, (None, noise)):
            options = TableOptions(m=m, k=k, shortlist=shortlist, rows=rows)
            options = replace(options, temperature=0.7, noise=added)
            assert_equal_tables(*(transitions(backend, prompt, options) for backend in models.both))

    def test_tables_of_several_texts_with_a_dialect_are_those_of_each(
        self, pair: PairMaker, dialect: str
    ) -> None:
        backend = pair(drafter={"dialect": dialect}).tested
        assert backend.drafter is not None
        roots = random_roots(backend, 3)
        together = backend.drafter.draft(roots)
        alone = [backend.drafter.draft([root])[0] for root in roots]
        options = TableOptions(m=3, k=4)
        tables = backend.drafter.marginals(together, options)
        for table, block in zip(tables, alone, strict=True):
            assert_equal_tables(table, backend.drafter.marginals([block], options)[0])
        if backend.head is None:
            return
        for shortlist in (None, 8):
            options = replace(options, shortlist=shortlist)
            tables = backend.head.transitions(together, options)
            for table, block in zip(tables, alone, strict=True):
                assert_equal_tables(table, backend.head.transitions([block], options)[0])

    def test_fewer_depths_of_a_dialect_are_the_first_ones(
        self, pair: PairMaker, dialect: str
    ) -> None:
        """A depth's output does not depend on how many depths or sequences are drafted."""
        backend = pair(drafter={"dialect": dialect}).tested
        assert backend.drafter is not None
        options = TableOptions(m=3, k=4)

        def tables(depths: int | None) -> list[TransitionTable]:
            assert backend.drafter is not None
            blocks = backend.drafter.draft(roots, depths)
            tables = backend.drafter.marginals(blocks, options)
            config = backend.drafter_config
            assert isinstance(config, DrafterConfig)
            # A recurrent head has a row for each path instead of each token.
            if backend.head is not None and not config.head_state_size:
                tables += backend.head.transitions(blocks, options)
            return tables

        for count in (1, 2):
            roots = random_roots(backend, count)
            all_depths = tables(None)
            for depths in (1, 2, all_depths[0].depths, all_depths[0].depths + 1):
                for few, whole in zip(tables(depths), all_depths, strict=True):
                    assert few.depths == min(depths, whole.depths)
                    assert_equal_tables(few, whole.truncate(depths))

    def test_log_probs_of_a_dialect_match_reference(self, pair: PairMaker, dialect: str) -> None:
        models = pair(drafter={"dialect": dialect})
        prompt = random_tokens(np.random.default_rng(1), models.reference.vocab_size, 5)
        results = []
        for backend in models.both:
            assert backend.drafter is not None
            assert backend.drafter_config is not None
            block, root = draft(backend, prompt)
            log_probs, depths = [backend.drafter.log_probs(block)], backend.drafter_config.depths
            assert log_probs[0].shape == (depths, backend.vocab_size)
            if backend.head is not None:
                previous = np.array([root, *range(2, depths + 1)], np.int32)
                log_probs.append(backend.head.log_probs(block, previous))
            results.append(log_probs)
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected)

    def test_tables_of_a_dialect_are_its_log_probs(self, pair: PairMaker, dialect: str) -> None:
        """A child's log probability belongs to its token after the tokens of its path."""
        backend = pair(drafter={"dialect": dialect}).tested
        assert backend.drafter_config is not None
        if backend.head is None:
            return
        prompt = random_tokens(np.random.default_rng(3), backend.vocab_size, 5)
        block, root = draft(backend, prompt)
        (table,) = backend.head.transitions([block], TableOptions(m=8, k=4))
        depths, chain = backend.drafter_config.depths, build_chain(table, root, 24)
        for tree in (build_tree(table, root, 24), chain):
            for node, path in enumerate(paths(tree)[1:], 1):
                before = np.resize(np.array(path[:-1], np.int32), depths)
                row = backend.head.log_probs(block, before)[len(path) - 2]
                step = tree.log_probs[node] - tree.log_probs[tree.parents[node]]
                assert step == pytest.approx(row[path[-1]], abs=TOLERANCE)
        config = backend.drafter_config
        assert isinstance(config, DrafterConfig)
        if config.head_state_size:  # else a row may be missing
            assert len(chain) == depths + 1
            (narrow,) = backend.head.transitions([block], TableOptions(m=1, k=1))
            assert build_chain(narrow, root, 24).tokens.tolist() == chain.tokens.tolist()

    @pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "seeded"])
    def test_generations_with_a_dialect_match_reference(
        self, pair: PairMaker, dialect: str, sampling: SamplingConfig
    ) -> None:
        """They match step by step, and have the tokens of plain decoding."""
        models = pair(drafter={"dialect": dialect})
        config = DecodeConfig(budget=24, sampling=sampling, max_tokens=12)
        methods = DRAFTING if models.reference.head else DRAFTING[:2]
        if not EXAMPLES:  # each method with one of the samplings, which changes with the dialect
            methods = methods[(list(DIALECTS).index(dialect) + sampling.greedy) % 2 :: 2]
        for method in methods:
            check_generation(models, replace(config, method=method))

    def test_budget_auto_with_a_dialect_equals_plain_decoding(
        self, pair: PairMaker, dialect: str
    ) -> None:
        """Also with the corrections that the budget learns, by depth and by confidence."""
        models = pair(drafter={"dialect": dialect})
        prompt = random_tokens(np.random.default_rng(5), models.tested.vocab_size, 6)
        budgets = AdaptiveBudgets(VerifyCosts({size: 1 + 0.01 * size for size in SIZES}))
        method: Method = "ddtree" if models.tested.head is None else "treeflash"
        request = Request(prompt_ids=prompt, config=DecodeConfig(method=method, **AUTO))
        steps = list(decode(models.tested, request, budgets))
        plain = generate(models.tested, prompt, DecodeConfig(method="ar", **AUTO))
        assert tokens_of(steps) == plain
        config = models.tested.drafter_config
        assert isinstance(config, DrafterConfig)
        trees = [step.tree for step in steps if step.tree is not None and len(step.tree) > 1]
        assert any(tree.confidences is not None for tree in trees) == config.confidence_head

    def test_other_dialects_are_refused(self, load: Loader, tmp_path: Path) -> None:
        write_target(tmp_path / "target", self.families[0], seed=TARGET_SEED)
        for dialect in DIALECTS.keys() - set(self.dialects):
            write_dialect(tmp_path / dialect, tmp_path / "target", dialect, seed=DRAFTER_SEED)
            with pytest.raises(UnsupportedModelError, match="does not support a drafter with"):
                load(tmp_path / "target", tmp_path / dialect, LOAD)


MISFITS: dict[str, tuple[Callable[[Config], object], str]] = {
    "hidden size": (lambda config: config.update(hidden_size=64), "hidden size is 64.* is 32"),
    "vocabulary": (lambda config: config.update(vocab_size=25), "vocabulary has 25.* has 24"),
    "layers": (lambda config: config.update(num_target_layers=9), "9 layers.* has 4"),
    "layer ids": (
        lambda config: config["dflash_config"].update(target_layer_ids=[0, 4]),
        r"layers \[0, 4\].* has 4",
    ),
    "mask token": (
        lambda config: config["dflash_config"].update(mask_token_id=24),
        "mask token 24 .*vocabulary of 24",
    ),
}


class ErrorTests:
    families: ClassVar[tuple[str, ...]]

    def test_missing_tensor_is_named(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        edit_tensors(drafter, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            load(target, drafter, LOAD)

    def test_misshapen_tensor_is_named(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        square = {"model.fc.weight": np.zeros((32, 32), np.float32)}
        edit_tensors(drafter, lambda tensors: tensors.update(square))
        with pytest.raises(CheckpointError, match=r"fc\.weight.*\(32, 32\).*\(32, 64\)"):
            load(target, drafter, LOAD)

    def test_missing_tensor_of_the_target_is_named(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        edit_tensors(target, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
        with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj"):
            decode_something(load, target, drafter)

    @pytest.mark.parametrize(("edit", "message"), MISFITS.values(), ids=MISFITS)
    def test_pair_that_does_not_fit(
        self, load: Loader, tmp_path: Path, edit: Callable[[Config], object], message: str
    ) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        edit_config(drafter, edit)
        with pytest.raises(CheckpointError, match=message):
            load(target, drafter, LOAD)

    @pytest.mark.parametrize("which", ["target", "drafter"])
    def test_truncated_file(self, load: Loader, tmp_path: Path, which: str) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        file = tmp_path / which / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=which):
            load(target, drafter, LOAD)

    @pytest.mark.parametrize("which", ["target", "drafter"])
    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_missing_file(self, load: Loader, tmp_path: Path, which: str, file: str) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        (tmp_path / which / file).unlink()
        with pytest.raises(CheckpointError, match=which):
            load(target, drafter, LOAD)

    def test_broken_config(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        (drafter / "config.json").write_text("{", encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(target, drafter, LOAD)

    @pytest.mark.parametrize("method", ["ar", "treeflash"])
    def test_target_that_is_not_a_number(
        self, load: Loader, tmp_path: Path, method: Method
    ) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        norm = "model.layers.1.input_layernorm.weight"
        edit_tensors(target, lambda tensors: tensors[norm].fill(np.nan))
        with pytest.raises(NumericalError, match="not finite"):
            decode_something(load, target, drafter, method)

    def test_one_node_that_is_not_a_number(self, load: Loader, tmp_path: Path) -> None:
        # In a large vocabulary the broken token is not met before the tree.
        write_target(tmp_path, self.families[0], seed=TARGET_SEED, vocab_size=4096)
        edit_tensors(tmp_path, lambda tensors: tensors["model.embed_tokens.weight"][7].fill(np.nan))
        (sequence,) = prompted([load(tmp_path, None, LOAD)], [1, 2, 3])
        tree = DraftTree.chain(np.array([4, 5, 7], np.int32))
        for sampling in SAMPLINGS.values():
            with pytest.raises(NumericalError, match="not finite"):
                sequence.verify(tree, sampling)

    @pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "infinity"])
    @pytest.mark.parametrize("vocab_size", [24, 2048])
    def test_drafter_that_is_not_finite(
        self, load: Loader, tmp_path: Path, vocab_size: int, value: float
    ) -> None:
        """In the larger vocabulary the AR head scores a shortlist, which is searched for."""
        assert DecodeConfig().head_vocab in range(24, 2048)
        target, drafter = write_pair(tmp_path, self.families[0], vocab_size=vocab_size)
        edit_tensors(drafter, lambda tensors: tensors["model.fc.weight"].put(0, value))
        message = "the drafter's output is not finite"
        backend = load(target, drafter, LOAD)
        for method in DRAFTING[:4]:  # `suffix` drafts without it where it can copy
            # NumPy warns where an infinity becomes NaN.
            with np.errstate(invalid="ignore"), pytest.raises(NumericalError, match=message):
                generate(backend, [1, 2, 3], DecodeConfig(method=method, budget=8, max_tokens=4))

    def test_prompts_that_cannot_be_decoded(self, pair: PairMaker) -> None:
        backend = pair(target={"max_positions": 32}).tested
        for prompt, message in (
            ([], "empty"),
            ([1] * 32, "limit is 32"),
            ([1, 24], "vocabulary of 24"),
            ([-1], "vocabulary of 24"),
        ):
            with pytest.raises(PromptError, match=message):
                decode(backend, Request(prompt_ids=prompt, config=DecodeConfig()))


def random_roots(backend: Backend, count: int) -> list[tuple[SequenceState, int]]:
    """Prefill sequences with random prompts: their states, and the target's token after each."""
    rng = np.random.default_rng(4)
    sequences = [SequenceSession(backend, drafts=True) for _ in range(count)]
    prompts = [random_tokens(rng, backend.vocab_size, 6) for _ in sequences]
    return [(x.state, x.extend(prompt)) for x, prompt in zip(sequences, prompts, strict=True)]


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = {name: np.array(tensor) for name, tensor in read_tensors(folder).items()}
    edit(tensors)
    save(folder, read_config(folder), tensors)


def decode_something(load: Loader, target: Path, drafter: Path, method: Method = "ar") -> None:
    backend = load(target, drafter, LOAD)
    generate(backend, [1, 2, 3], DecodeConfig(method=method, budget=8, max_tokens=4))
