"""The notebook for a first GPU, run on a CPU with a tiny pair."""

import json
import shutil
from pathlib import Path

import pytest
from endless_pair import endless_pair

from treeflash.testing import require

require("torch")
require("matplotlib")

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
def test_the_notebook_compares_plots_and_writes_a_report(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    _, target, _, drafter = pair = endless_pair(tmp_path / "pair")
    source = tmp_path / "clone"
    source.mkdir()
    shutil.copytree(ROOT / "benchmarks", source / "benchmarks")
    cells = json.loads((ROOT / "docs" / "first_gpu.ipynb").read_text())["cells"]
    variables = {}
    tags = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        tags += (found := cell["metadata"].get("tags", []))
        assert cell["outputs"] == [], "outputs are not stored"
        if "install" in found:
            assert "%pip install" in "".join(cell["source"])
            continue
        exec("".join(cell["source"]), variables)
        if "parameters" in found:
            load = {"target": target, "drafter": drafter, "device": "cpu", "dtype": "float32"}
            options = [*pair, "--backend", "cuda", "--device", "cpu", "--minutes", "1"]
            options += ["--shape", "tiny", "--max-tokens", "4"]
            variables |= {"PAIR": load, "MAX_TOKENS": 8, "SOURCE": str(source)}
            variables["REPORT_OPTIONS"] = options
    assert tags == ["install", "parameters"]
    texts = [[text.token_ids for text in found] for found in variables["answers"].values()]
    assert texts[0] == texts[1]
    assert (tmp_path / "tokens_per_second.png").stat().st_size > 1000
    report = json.loads((source / "report.json").read_text())
    assert report["parts"][0]["tables"]["device"]
