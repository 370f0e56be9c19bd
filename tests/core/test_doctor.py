"""The command line of the doctor, on a tiny random pair of the reference backend."""

import io
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from byte_tokens import save_tokenizer
from failures import failing
from mtp_pairs import write_mtp_pair

from treeflash.commands import doctor
from treeflash.commands.doctor import main
from treeflash.decoding.backend_base import BaseBackend
from treeflash.decoding.interfaces import DeviceReport
from treeflash.drafters.evaluation import EVALUATION
from treeflash.errors import UnsupportedModelError
from treeflash.reference import backend as reference_backend
from treeflash.testing.models import write_target

pytestmark = pytest.mark.usefixtures("quick_collections")


def options_of(pair):
    target, drafter = map(str, pair)
    return ["--backend", "reference", "--target", target, "--drafter", drafter]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": 1, "prompt": "one"}, {"id": 2, "turns": ["two", "three"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def evaluated(tiny_pair, tmp_path_factory):
    """The options of the pair, whose drafter has an evaluation."""
    target, drafter = tiny_pair
    folder = shutil.copytree(drafter, tmp_path_factory.mktemp("pair") / "evaluated")
    (folder / EVALUATION).write_text('{"max_length": 64, "top1_marginal": [0.75, 0.5]}')
    return options_of((target, folder))


@pytest.fixture(scope="module")
def examined(evaluated, prompts, tmp_path_factory):
    """The pair, examined once on a machine that has measured no costs.

    Exit code, standard output, standard error, and the devices of its loads.
    """
    devices, locate = [], doctor.locate_model

    def located(args, **changes):
        devices.append(args.device)
        return locate(args, **changes)

    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        patch.setenv("TREEFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(doctor, "locate_model", located)
        code = main([*evaluated, "--prompts", prompts, "--max-tokens", "12"])
    return code, out.getvalue(), err.getvalue(), devices


def checks_of(lines):
    """The names of the checks whose findings these lines are."""
    return [line[9:23].strip() for line in lines if line.startswith(("ok ", "problem "))]


def test_report(examined):
    code, out, *_ = examined
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("agreement by depth: ")
    assert lines[1].startswith("with the AR head:   ")
    assert lines[2] == "in its evaluation:  75% 50%"
    assert lines[3].startswith("problem  depths         the drafter's top token at depth 1 ")
    checks = ["depths", "block offset", "prompting", "target layers", "mask token", "exact mode"]
    assert checks_of(lines) == [*checks, "images"]
    assert lines[-1] == "can draft, best first: suffix"


def test_the_costs_of_passes_are_shown(examined):
    assert "costs: measured by the first text with --budget auto" in examined[2]


def test_every_check_is_announced_and_loads_a_pair(examined):
    *_, err, devices = examined
    lines = re.findall(r"^check (\d+) of (\d+): (.*)$", err, re.MULTILINE)
    assert [int(number) for number, _, _ in lines] == list(range(1, len(lines) + 1))
    assert {int(total) for _, total, _ in lines} == {len(lines)} == {len(devices) - 1}
    assert list(dict.fromkeys(check for _, _, check in lines)) == ["target layers", "mask token"]


def test_what_the_first_load_shows_is_told_before_the_checks(examined):
    _, out, err, _ = examined
    first, _, checks = err.partition("check 1 of")
    assert checks
    lines = out.splitlines()
    shown = [line for line in lines if line in first]
    assert checks_of(shown) == ["depths", "exact mode", "images"]
    assert shown[:2] == lines[:2]  # the agreement by depth


def test_a_terminal_shows_each_finding_once(evaluated, prompts, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main([*evaluated, "--prompts", prompts, "--max-tokens", "12"])
    out, err = capsys.readouterr()
    found = re.findall(r"^(?:ok|problem) +(\w+(?: \w+)?)  ", err + out, re.MULTILINE)
    assert {"depths", "block offset", "images"} < set(found)
    assert len(set(found)) == len(found)
    assert (err + out).count("agreement by depth") == 1


def test_only_the_first_load_may_choose_the_device(examined):
    *_, devices = examined
    assert devices[0] is None
    assert set(devices[1:]) == {"cpu"}


def test_json(evaluated, prompts, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where one line says what is checked
    code = main([*evaluated, "--json", "--prompts", prompts, "--max-tokens", "12", "--thinking"])
    out, err = capsys.readouterr()
    assert "\ncheck" not in err
    found = json.loads(out)
    assert code == 1
    assert not found["ok"]
    assert len(found["marginal"]) == len(found["corrected"]) == 5
    assert found["evaluation"] == [0.75, 0.5]
    assert found["findings"][0].keys() == {"check", "ok", "message"}


@pytest.mark.parametrize("kind", ["mtp", "eagle3"])
def test_a_head_that_drafts_depth_by_depth_is_no_problem(kind, tmp_path, capsys):
    """Its settings are not checked; the machine, the target and exact mode are."""
    target, head = map(str, write_mtp_pair(tmp_path, kind))
    save_tokenizer(Path(target))
    drafter = "self" if kind == "mtp" else head
    assert main(["--backend", "reference", "--target", target, "--drafter", drafter]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert [line[9:23].strip() for line in lines[:-1]] == ["drafter", "exact mode", "images"]
    assert "treeflash evaluate measures it" in lines[0]


def test_a_target_without_a_drafter_is_diagnosed(tmp_path, capsys):
    write_target(tmp_path, "qwen3", seed=0)
    save_tokenizer(tmp_path)
    assert main(["--backend", "reference", "--target", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["marginal"] is None
    assert [x["check"] for x in found["findings"]] == ["drafter", "exact mode", "images"]
    assert "method suffix" in found["findings"][0]["message"]
    assert found["drafters"] == ["suffix"]
    with failing(BaseBackend, "check_trees", UnsupportedModelError("its layers")):
        assert main(["--backend", "reference", "--target", str(tmp_path)]) == 0
    assert "which runs no draft trees, so nothing is drafted" in capsys.readouterr().out


def test_the_device_alone_is_examined_without_a_model(monkeypatch, capsys):
    asked = []

    def examine_device(config):
        asked.append(config.dtype)
        kernels = {"products": {"8 rows": "used", "16 rows": "not used"}}
        return DeviceReport(facts={"chip": "made up"}, kernels=kernels)

    monkeypatch.setattr(reference_backend, "examine_device", examine_device, raising=False)
    options = ["--backend", "reference", "--device-only", "--target", "nowhere/at/all"]
    assert main([*options, "--dtype", "float32"]) == 0
    assert asked == ["float32"]
    assert capsys.readouterr().out.splitlines() == [
        "ok       device         chip: made up",
        "ok       kernel         products: 8 rows used; 16 rows not used",
    ]
    assert main([*options, "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [x["check"] for x in findings] == ["device", "kernel"]


def test_a_backend_that_cannot_tell_about_its_device_says_so(capsys):
    assert main(["--backend", "reference", "--device", "cpu", "--device-only"]) == 2
    assert capsys.readouterr().err == ("error: the reference backend cannot describe its device\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-tokens", "0"], "max_tokens must be 1 or more, got 0"),
        (["--max-tokens", "1"], "too short to score a drafter; raise --max-tokens"),
        (["--raw", "--thinking"], "not allowed with argument --raw"),
        (["--prompts", "nowhere"], "nowhere cannot be read"),
        (["--drafter", "nowhere/at/all"], "is not a folder"),
        (["--max-depth"], "unrecognized arguments"),
    ],
)
def test_bad_input(pair_options, capsys, args, message):
    code = main([*pair_options, *args])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
