"""Conversion between formats: exact round trips, equal drafts, and refusals by name."""

import errno
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from failures import failing

from treeflash.commands.convert import main
from treeflash.decoding.interfaces import TableOptions
from treeflash.drafters import conversion
from treeflash.drafters.conversion import convert
from treeflash.drafters.folder import read_config, read_stored, read_tensors, write_stored
from treeflash.drafters.formats import detect_format, unknown_keys
from treeflash.drafters.heads.treeflash import PREFIX
from treeflash.drafters.loading import drafter_config
from treeflash.errors import ConfigError
from treeflash.testing.comparisons import assert_equal_tables
from treeflash.testing.models import edit_config, save, write_dialect
from treeflash.testing.pairs import LOAD, load_reference
from treeflash.testing.trees import marginals, transitions

PROMPT = [3, 4, 5, 6]


@pytest.fixture
def published(dflash_folder: Path) -> Path:
    edit_config(dflash_folder, lambda c: c.update(architectures=["DFlashDraftModel"]))
    return dflash_folder


def test_speculators_and_back_is_exact(published, tmp_path):
    convert(published, tmp_path / "there", "speculators", target="Qwen/Qwen3-4B")
    convert(tmp_path / "there", tmp_path / "back", "dflash")
    assert read_config(tmp_path / "back") == read_config(published)
    before, after = read_tensors(published), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    verifier = read_config(tmp_path / "there")["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == "Qwen/Qwen3-4B"
    assert drafter_config(tmp_path / "there").target_layer_ids == (0, 2)
    pairs = [
        load_reference(tmp_path / "target", folder, LOAD)
        for folder in (published, tmp_path / "there")
    ]
    assert_equal_tables(*(marginals(pair, PROMPT, TableOptions(k=8)) for pair in pairs))


@pytest.mark.parametrize(
    ("dialect", "back"),
    [
        ("deepspec", "deepspec"),
        ("deepspec-gated", "deepspec"),
        ("deepspec-rnn", "deepspec"),
        ("deepspec-dflash", "deepspec"),
        ("specforge", "deepspec"),
        ("dflash2", "dflash"),
    ],
)
def test_heads_to_speculators_and_back(folder, tmp_path, dialect, back):
    """The same tables there, and the same drafter back."""
    origin = tmp_path / "origin"
    write_dialect(origin, tmp_path / "target", dialect, seed=1)
    if dialect == "dflash2":
        edit_config(origin, lambda c: c.update(layer_types=None, is_causal=None))
    complete = [
        convert(origin, tmp_path / "there", "speculators", target="target"),
        convert(tmp_path / "there", tmp_path / "back", back),
    ]
    assert complete == [None, None], "no head was left out"
    parsed, again = drafter_config(origin), drafter_config(tmp_path / "back")
    assert again == replace(parsed, own_vocabulary=again.own_vocabulary)
    before, after = read_tensors(origin), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    pairs = [
        load_reference(tmp_path / "target", where, LOAD) for where in (origin, tmp_path / "there")
    ]
    assert_equal_tables(*(marginals(pair, PROMPT, TableOptions(k=8)) for pair in pairs))
    if parsed.head is not None:
        assert_equal_tables(*(transitions(pair, PROMPT, TableOptions(m=3, k=4)) for pair in pairs))


SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}
UNSTEPPED = "the head rnn after a root's slot that predicts nothing"
CANNOT = [
    ("dflash2", {}, "speculators", "sliding windows"),
    ("speculators-dspark", {}, "dflash", "heads"),
    ("speculators-dspark", {}, "deepspec", "a vocabulary of its own"),
    ("speculators-dflash", {}, "dflash", "a vocabulary of its own"),
    ("speculators-dflash2", {}, "deepspec", "heads"),
    # `speculators` steps it over the slot; our loader refuses such files.
    ("deepspec-rnn", {"sample_from_anchor": False}, "speculators", UNSTEPPED),
    ("dflash", {"final_logit_softcapping": 30.0}, "speculators", "a softcap"),
    ("dflash", {"output_multiplier": 0.5}, "speculators", "a factor on its logits"),
    ("dflash", {"input_embedding_scale": 2.0}, "speculators", "a factor on its embeddings"),
    ("dflash", {"is_causal": True}, "speculators", "causal full attention"),
    ("dflash", SLIDING, "speculators", "sliding windows"),
]


@pytest.mark.parametrize(("dialect", "settings", "to", "problem"), CANNOT)
def test_what_a_format_cannot_express(published, tmp_path, dialect, settings, to, problem):
    if dialect != "dflash":
        write_dialect(published, tmp_path / "target", dialect, seed=1)
    edit_config(published, lambda config: config.update(settings))
    expected = f"^{re.escape(f'{to} cannot express {problem}, which this drafter has')}$"
    with pytest.raises(ConfigError, match=expected):
        convert(published, tmp_path / "there", to, target="target")
    assert not (tmp_path / "there").exists()


def test_a_new_head_changes_nothing(published, tmp_path):
    convert(published, tmp_path / "headed", "treeflash")
    backend = load_reference(tmp_path / "target", tmp_path / "headed", LOAD)
    assert backend.drafter_config.head == "linear"
    plain = marginals(
        load_reference(tmp_path / "target", published, LOAD), PROMPT, TableOptions(k=4)
    )
    table = transitions(backend, PROMPT, TableOptions(m=2, k=4))
    assert table.tokens.shape[1] == 2
    assert transitions(backend, PROMPT, TableOptions(k=4)).tokens.shape[1] == 1, "the default"
    for row in range(2):
        first = 0 if row == 0 else 1  # depth 1 has one row
        np.testing.assert_array_equal(table.tokens[first:, row], plain.tokens[first:, 0])
        np.testing.assert_allclose(
            table.log_probs[first:, row], plain.log_probs[first:, 0], atol=1e-6
        )


def test_a_head_is_not_dropped(folder, tmp_path):
    message = (
        "^cannot convert a TreeFlash drafter to speculators, which takes DFlash or DFlash2 or .*; "
        r"vLLM runs it with treeflash's own plugin .* or choose dflash$"
    )
    with pytest.raises(ConfigError, match=message):
        convert(folder, tmp_path / "there", "speculators", target="target")


def test_formats_that_lead_nowhere_are_named(published, tmp_path):
    message = "^cannot convert a DFlash drafter to deepspec, .*; choose treeflash or speculators$"
    with pytest.raises(ConfigError, match=message):
        convert(published, tmp_path / "there", "deepspec")
    with pytest.raises(ConfigError, match="unknown format 'gguf'; choose one of treeflash, "):
        convert(published, tmp_path / "there", "gguf")


def test_a_treeflash_drafter_without_its_head_is_a_dflash_drafter(folder, tmp_path, capsys):
    output = tmp_path / "there"
    assert main([str(folder), str(output), "--to", "dflash"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}\n"
    assert re.fullmatch(r"dflash has no AR heads: the \w+ head was left out\n", err)
    assert detect_format(read_config(output)).name == "DFlash"
    assert unknown_keys(read_config(output)) == unknown_keys(read_config(folder))
    drafts = [
        marginals(load_reference(tmp_path / "target", own, LOAD), PROMPT, TableOptions(k=4))
        for own in (folder, output)
    ]
    assert_equal_tables(*drafts)
    convert(output, tmp_path / "speculators", "speculators", target="target")
    assert drafter_config(tmp_path / "speculators").head is None


def test_a_drafter_trained_without_a_head_is_dflash(published, tmp_path):
    settings = {"ar_approximation": None, "candidate_tokens": 16}
    edit_config(published, lambda c: c.update(treeflash_config=settings))
    assert detect_format(read_config(published)).name == "DFlash"
    convert(published, tmp_path / "there", "speculators", target="target")
    assert unknown_keys(read_config(tmp_path / "there")) == []
    convert(published, tmp_path / "headed", "treeflash")
    assert drafter_config(tmp_path / "headed").head == "linear"


def test_an_output_head_is_not_dropped(published, tmp_path):
    convert(published, tmp_path / "own", "speculators", target="target")
    tensors = read_tensors(tmp_path / "own") | {"lm_head.weight": np.ones((24, 32), np.float32)}
    save(tmp_path / "own", read_config(tmp_path / "own"), tensors)
    with pytest.raises(ConfigError, match=r"^dflash cannot express the drafter's own lm_head"):
        convert(tmp_path / "own", tmp_path / "there", "dflash")


def test_a_new_head_has_the_type_of_the_weights(published, tmp_path):
    stored = read_stored(published / "model.safetensors")
    halves = {
        name: (np.frombuffer(part["data"], "<u4") >> 16).astype("<u2").tobytes()
        for name, part in stored.items()
    }
    entries = {name: ("BF16", stored[name]["shape"], len(x)) for name, x in halves.items()}
    write_stored(published / "model.safetensors", entries, halves.values())
    convert(published, tmp_path / "headed", "treeflash")
    headed = read_stored(tmp_path / "headed" / "model.safetensors")
    assert {part["dtype"] for part in headed.values()} == {"BF16"}
    tensors = read_tensors(tmp_path / "headed")
    np.testing.assert_array_equal(tensors[f"model.{PREFIX}norm.weight"], np.ones(32))


def test_nothing_is_overwritten(published, tmp_path):
    with pytest.raises(ConfigError, match=r"exists and is not an empty folder$"):
        convert(published, tmp_path, "treeflash")


def test_command(published, tmp_path, capsys):
    output = tmp_path / "there"
    assert main([str(published), str(output), "--to", "treeflash"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert main([str(published), str(tmp_path / "other"), "--to", "speculators"]) == 2
    error = capsys.readouterr().err
    assert "name the target (--target)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_conversion_that_stops_leaves_no_half_of_a_drafter(published, tmp_path, error):
    with (
        failing(conversion, "write_stored", error),
        pytest.raises((ConfigError, KeyboardInterrupt)) as caught,
    ):
        convert(published, tmp_path / "there", "treeflash")
    assert str(caught.value) in (f"{tmp_path / 'there'} cannot be written: No space left", "")
    convert(published, tmp_path / "there", "treeflash")
