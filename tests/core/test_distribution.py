"""What the wheel contains."""

from pathlib import Path

import pytest

builders = pytest.importorskip("hatchling.builders.wheel")
ROOT = Path(__file__).parents[2]
# Most of it is the bundled drafter; packages of an index may have 100 MB.
MOST_BYTES = 50e6


def test_the_wheel_has_the_packages_and_nothing_else():
    included = builders.WheelBuilder(str(ROOT)).recurse_included_files()
    files = {
        file.distribution_path: Path(file.path).stat().st_size
        for file in included
        if "__pycache__" not in file.path
    }
    packages = {Path(name).parts[0] for name in files}
    assert packages == {"treeflash", "treeflash_cuda", "treeflash_mlx", "treeflash_vllm"}
    assert not [name for name in files if "test_" in name]
    assert {"treeflash/py.typed", "treeflash/serving/page/index.html"} <= files.keys()
    assert [name for name in files if name.endswith("model.safetensors")]
    assert sum(files.values()) < MOST_BYTES
