"""Draft sources that are found automatically: what cannot be used is skipped with one line."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from byte_tokens import save_tokenizer
from failures import failing
from mtp_pairs import write_mtp_pair
from safetensors.numpy import save_file

from treeflash.commands import doctor, generate
from treeflash.commands import drafters as drafters_command
from treeflash.config import LoadConfig
from treeflash.errors import CheckpointError, TreeflashError, UnsupportedModelError
from treeflash.hub import models
from treeflash.hub.published import PublishedDrafter
from treeflash.language_model import LanguageModel, load, locate
from treeflash.reference.backend import check_drafter
from treeflash.testing.models import edit_config

UNSUPPORTED = [
    # The targets have 4 layers, so that layer 4 is an MTP head in the layout of DeepSeek-V3.
    ("model.layers.4.eh_proj.weight", "the MTP head of llama models"),
    ("model.mtp_layers.0.input_proj.weight", "in the layout of MiMo are"),
]
"""A tensor of a head that is not supported, and part of the reason; the golden formats have all."""


@pytest.fixture(params=UNSUPPORTED)
def unsupported(request, tiny_pair, tmp_path):
    """The folder of a target with an MTP head that is not supported, and part of the reason."""
    name, reason = request.param
    folder = shutil.copytree(tiny_pair[0], tmp_path / "model")
    save_file({name: np.zeros((2, 2), np.float32)}, folder / "mtp.safetensors")
    return folder, reason


def one_line(lines: list[str], *parts: str) -> None:
    (line,) = lines
    assert "is skipped" in line
    for part in parts:
        assert part in line


def texts(model: LanguageModel) -> list[int]:
    return model.generate("hi", max_tokens=12).token_ids


@pytest.mark.parametrize("drafter", [None, "auto"])
def test_an_unsupported_head_is_passed_over(unsupported, drafter, caplog):
    folder, reason = unsupported
    model = load(folder, drafter, backend="reference")
    one_line(caplog.messages, f"the MTP head in {folder}", reason)
    assert model.best_method == "suffix"
    assert texts(model) == texts(load(folder, False, backend="reference"))


def test_generate_prints_one_line_and_the_text_of_plain_decoding(unsupported, capsys, caplog):
    folder, reason = unsupported
    arguments = [*("--target", str(folder), "--backend", "reference"), "hi", "--max-tokens", "8"]
    printed = []
    for extra in ([], ["--drafter", "auto"], ["--method", "ar"]):
        assert generate.main([*arguments, *extra]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert len(caplog.messages) == 2  # plain decoding looks for no drafter
    for message in caplog.messages:
        one_line([message], reason)


def test_the_list_of_drafters_leaves_an_unsupported_head_out(unsupported, capsys, caplog):
    folder, reason = unsupported
    assert drafters_command.main([str(folder), "--json"]) == 0
    (rows,) = json.loads(capsys.readouterr().out).values()
    assert [(row["name"], row["option"]) for row in rows] == [("suffix", "the default")]
    one_line(caplog.messages, str(folder), reason)


def test_an_unsupported_head_is_an_error_where_it_was_asked_for(unsupported):
    folder, reason = unsupported
    for drafter in ("self", folder):
        with pytest.raises(UnsupportedModelError, match=reason):
            load(folder, drafter, backend="reference")


def test_a_head_with_an_unsupported_setting_is_passed_over(tmp_path, caplog, capsys):
    target, _ = write_mtp_pair(tmp_path, "mtp", vocab_size=300)
    save_tokenizer(target)
    edit_config(target, lambda config: config["text_config"].update(mtp_num_hidden_layers=2))
    reason = "mtp_num_hidden_layers = 2 is not supported"
    assert load(target, backend="reference").best_method == "suffix"
    one_line(caplog.messages, reason)
    caplog.clear()
    assert drafters_command.main([str(target), "--json"]) == 0
    assert '"self"' not in capsys.readouterr().out
    one_line(caplog.messages, reason)
    with pytest.raises(CheckpointError, match=reason):
        load(target, "self", backend="reference")


@pytest.fixture
def published(monkeypatch):
    """Publish drafters for every target, by their names, which must be folders."""

    def publish(*names: Path | str) -> None:
        drafters = tuple(PublishedDrafter(name=str(name)) for name in names)
        monkeypatch.setattr(models, "published_drafters", lambda target: drafters)

    return publish


def test_the_next_published_drafter_is_taken(tiny_pair, tmp_path, published, caplog):
    target, drafter = tiny_pair
    wide = tmp_path / "wide"
    shutil.copytree(drafter, wide)
    edit_config(wide, lambda config: config.update(hidden_size=64))
    published(tmp_path / "missing", wide, drafter)
    pair = locate(target, backend="reference")
    assert pair.drafter == drafter
    first, second = caplog.messages
    one_line([first], f"the drafter {tmp_path / 'missing'} is skipped")
    one_line([second], f"the drafter {wide} is skipped", "its hidden size is 64")
    caplog.clear()
    options = ["--backend", "reference", "--target", str(target), "--max-tokens", "4"]
    assert doctor.main(options) in (0, doctor.PROBLEM)
    assert "wide is skipped" in caplog.text
    assert models.resolve_drafter("auto", str(target)) == wide  # which asks no backend
    for name in (tmp_path / "missing", wide):
        with pytest.raises(CheckpointError):
            load(target, name, backend="reference")


def test_the_target_s_own_head_comes_after_published_drafters(tmp_path, published, caplog):
    target, _ = write_mtp_pair(tmp_path, "mtp")
    published(tmp_path / "missing")
    assert locate(target, backend="reference").drafter == target
    one_line(caplog.messages, "missing is skipped")


def test_a_drafter_that_the_backend_lacks_is_passed_over(tiny_pair, published, caplog):
    target, drafter = tiny_pair
    published(drafter)
    refused = UnsupportedModelError("this backend has no such drafters")
    with failing(import_module(check_drafter.__module__), "check_drafter", refused):
        assert load(target, backend="reference").drafter_folder is None
    one_line(caplog.messages, f"the drafter {drafter}", "this backend has no such drafters")


def test_a_drafter_that_fails_while_it_loads_is_passed_over(tiny_pair, published, caplog):
    """Its headers are right, and a value shows that it cannot be used only later."""
    target, drafter = tiny_pair
    published(drafter)
    pair = locate(target, backend="reference")
    attempts = []

    def loader(target: Path, drafter: Path | None, config: LoadConfig):
        attempts.append(drafter)
        if drafter is not None:
            raise CheckpointError("its weights are not finite")
        return pair.loader(target, None, config)

    changed = {**vars(pair), "loader": loader}
    model = type(pair)(**changed).load()
    assert attempts == [drafter, None]
    assert model.drafter_folder is None
    assert model.best_method == "suffix"
    one_line(caplog.messages, str(drafter), "its weights are not finite")
    named = type(pair)(**changed | {"automatic": False})
    with pytest.raises(CheckpointError, match="not finite"):
        named.load()


def test_a_broken_target_is_an_error_of_the_target(tiny_pair, published, caplog):
    target, drafter = tiny_pair
    published(drafter)
    pair = locate(target, backend="reference")

    def loader(target: Path, drafter: Path | None, config: LoadConfig):
        raise CheckpointError(f"the target is damaged ({drafter})")

    with pytest.raises(TreeflashError, match=r"the target is damaged \(None\)"):
        type(pair)(**{**vars(pair), "loader": loader}).load()
    assert not caplog.messages
