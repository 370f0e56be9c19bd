"""The benchmarks that need MLX run, on a tiny pair and whatever device MLX has here."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from byte_tokens import endless_pair, save_tokenizer
from mtp_pairs import write_mtp_pair
from stand_ins import stand_in

import treeflash
from treeflash.config import METHODS
from treeflash.decoding.interfaces import DeviceReport
from treeflash.decoding.loop import Step
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.text.generation import PHASES

require("mlx.core")
require("mlx_lm")

pytestmark = pytest.mark.sample(1)


@pytest.fixture
def pair(tmp_path):
    """Options that choose a tiny pair."""
    return [*endless_pair(tmp_path), "--max-tokens", "4"]


@pytest.fixture
def mac(module, pair):
    options = ["--sizes", "1,3", "--contexts", "2,5,100000000", "--repeats", "1"]
    args = module("device_report").parser().parse_args([*pair, *options])
    args.backend = "mlx"
    return module("mlx_parts").Mac(args, end=time.time() + 600)


# Seconds, for parts that change seldom; the next tests look at what parts say.
@pytest.mark.nightly
def test_the_target_is_measured(module, mac, monkeypatch):
    parts, part = module("mlx_parts"), module("report").Part("measurements")
    monkeypatch.setattr(parts, "PROMPT_LENGTHS", (40, 100_000_000))
    for name in ("speed", "peer", "prompts", "passes", "host", "plain"):
        parts.PARTS[name](mac, part)
    assert [(row["context"], row["nodes"]) for row in part.tables["passes"]] == [
        *((2, 1), (2, 3), (5, 1), (5, 3)),  # more positions than the target has are left out
    ]
    names = [(row["tokens"], row["products"]) for row in part.tables["prompts"]]
    assert names == [(40, "shared where it wins"), (40, "GPU alone")]
    assert [row["nodes"] for row in part.tables["host"]] == [1, 8, 16]
    assert all(row["build_ms"] > 0 and row["commit_ms"] > 0 for row in part.tables["host"])
    assert all(row["nodes"] >= 1 for row in part.tables["methods"] if row["method"] in METHODS)
    assert part.tables["costs"][0]["nodes"] == 1
    assert [row["texts"] for row in part.tables["together"]] == [4, 4]
    assert part.tables["together"][0]["equal_up_to"] == 4  # tokens, in float32
    assert [row["token_ms"] > 0 for row in part.tables["plain"]] == [True, True]
    assert [(row["system"], row["method"]) for row in part.tables["methods"]] == [
        *(("treeflash", method) for method in METHODS),
        ("mlx-lm", "generate"),
    ]
    assert all(row["tokens_per_s"] > 0 for row in part.tables["methods"])


def test_passes_whose_keys_have_no_room_are_left_out(module, mac, monkeypatch):
    parts, part = module("mlx_parts"), module("report").Part("passes")
    backend = mac.load_model().backend
    free = backend.state_nbytes(200, drafts=False)
    stand_in(
        monkeypatch,
        parts,
        device_report=lambda _: DeviceReport(reserved_bytes=free),
    )
    stand_in(
        monkeypatch,
        module("device_parts"),
        verify_rows=lambda _, context, *__: [{"context": context}],
    )
    mac.args.contexts = [100, 400]
    parts.passes(mac, part)
    assert part.tables["passes"] == [{"context": 100}]
    (note,) = part.notes
    assert note.startswith("passes after 400 positions were left out: their keys take 0.0 GiB, and")


# Every part of the report, in which most is what the next tests measure.
@pytest.mark.nightly
def test_a_report_goes_on_after_a_part_that_fails(
    module, pair, tmp_path, in_this_process, monkeypatch, capsys
):
    file, parts, shared = tmp_path / "out.json", module("mlx_parts"), module("device_parts")

    def method_rows(*_):
        raise RuntimeError("the GPU is busy")

    stand_in(monkeypatch, shared, method_rows=method_rows, SUITE=tmp_path / "none")
    options = ["--sizes", "1,3", "--contexts", "2", "--repeats", "1", "--json", str(file)]
    assert module("device_report").main([*pair, "--backend", "mlx", *options]) == 1
    report = json.loads(file.read_text())
    assert "speed: RuntimeError: the GPU is busy" in report["problems"]
    assert {line.partition(":")[0] for line in report["problems"]} <= {"speed", "exact"}
    found = {part["name"]: part["tables"] for part in report["parts"]}
    assert list(found) == list(parts.PARTS)
    assert len(found["plain"]["plain"]) == len(found["larger buffers"]["plain"]) == 2
    assert [row["nodes"] for row in found["passes"]["passes"]] == [1, 3]
    assert [found[name]["methods"][0]["system"] for name in ("peer", "peer again")] == [
        "mlx-lm"
    ] * 2
    assert f"send {file}" in capsys.readouterr().out


def test_a_part_has_larger_buffers_for_its_process_alone(module, monkeypatch):
    parts, seen = module("mlx_parts"), []
    monkeypatch.delenv("MLX_MAX_OPS_PER_BUFFER", raising=False)
    stand_in(monkeypatch, parts, plain=lambda *_: seen.append(dict(os.environ)))
    parts.larger_buffers(None, None)
    assert seen[0].items() >= parts.LARGER.items()
    assert "MLX_MAX_OPS_PER_BUFFER" not in os.environ


def test_a_kernel_that_is_wrong_is_a_problem_and_one_that_loses_is_not(module):
    verdicts = {
        "5 rows": "used, 1.30 times as fast as MLX's operation",
        "7 rows": "not used, 0.90 times as fast as MLX's operation",
        "9 rows": "not used, its relative error is 1.0e+00",
    }
    found = module("device_parts").kernel_problems(DeviceReport(kernels={"products": verdicts}))
    assert list(found) == ["products, 9 rows: not used, its relative error is 1.0e+00"]


def test_the_verdicts_of_a_model_are_in_the_report(module):
    """With the whole message of a compiler; one geometry that fails is a problem, too."""
    parts, part = module("device_parts"), module("report").Part("speed")
    verdicts = {
        "5 rows": "used, 1.30 times as fast as MLX's operation with a; not with b, no such type",
        "7 rows": "not used, program_source:57:9: error: no matching function",
    }
    message = "Unable to build\nprogram_source:57:9: error: no matching function\nnote: more"
    messages = {"products, 7 rows": message}
    parts.add_kernels(part, DeviceReport(kernels={"products": verdicts}, messages=messages))
    assert [row["verdict"] for row in part.tables["verdicts"]] == list(verdicts.values())
    assert part.tables["messages"] == [{"kernel": "products, 7 rows", "message": message}]
    assert part.problems == [f"products, {size}: {text}" for size, text in verdicts.items()]


def test_warnings_of_all_packages_of_treeflash_are_problems(module):
    is_ours = module("report").is_of_treeflash
    site = "/x/treeflash/.venv/lib/python3.12/site-packages"
    for file in (
        "/x/clone/backends/treeflash_mlx/metal_kernels/products.py",
        "/x/clone/treeflash/drafters/heads/markov.py",
        f"{site}/treeflash_mlx/backend.py",
    ):
        assert is_ours(Path(file)), file
    for file in (f"{site}/mlx_lm/utils.py", f"{site}/torch/nn/modules/x.py", "/lib/warnings.py"):
        assert not is_ours(Path(file)), file


def test_the_text_that_warms_up_is_in_no_figure(module):
    class Stream:
        """The first text has iterations of a token and nine seconds, the others one of four."""

        def __init__(self, prompt, **options):
            lengths, seconds = ([4], 0.5) if calls else ([1, 1], 9.0)
            calls.append(prompt)
            tree = DraftTree.root_only(3)
            phases = dict.fromkeys(PHASES, seconds)
            self.steps = [Step((5,), phases), *(Step((5,) * n, phases, tree) for n in lengths)]
            self.run = lambda: SimpleNamespace(
                token_ids=[5], accepted_lengths=lengths, decode_s=2.0, paused_iterations=0
            )

    calls = []
    model = SimpleNamespace(stream=Stream)
    (row,) = module("device_parts").method_rows(model, ["treeflash"], [[3], [4]], 8)
    assert calls == [[3], [3], [4]]
    assert row["block_efficiency"] == 4
    assert (row["tokens_per_s"], row["ratio_to_ar"]) == (2, 1)
    assert all(row[f"{phase}_ms"] == 500 for phase in PHASES[1:])


# Seconds, for a list of methods.
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["mtp", "eagle3", "none"])
def test_a_report_measures_what_a_pair_without_a_block_drafter_can_do(module, tmp_path, kind):
    if kind == "none":
        target, head = tmp_path / "target", None
        write_target(target, "qwen3", seed=1)
    else:
        target, head = write_mtp_pair(tmp_path, kind)
    save_tokenizer(target)
    model = treeflash.load(target, False if head is None else head, backend="mlx")
    methods = module("common").supported_methods(model.backend)
    assert methods[0] == "ar"
    assert methods == ["ar", *(["treeflash", "treeflash-chain"] if head else []), "suffix"]
    for method in methods:
        assert len(model.generate([3, 4, 5], method=method, max_tokens=4).token_ids) > 0
