"""The cost of verifying trees: how it is measured, kept, read back and updated."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from failures import failing

from treeflash.config import LoadConfig
from treeflash.decoding import verify_costs
from treeflash.decoding.interfaces import DeviceReport, Prefill
from treeflash.decoding.sampling import SampledTokens
from treeflash.decoding.verify_costs import (
    COST_SMOOTHING,
    GPU_PROMPT_TOKENS,
    LONG_PROMPT_TOKENS,
    OUTLIER_FACTOR,
    PROMPT_TOKENS,
    SIZES,
    TIMED,
    VerifyCosts,
)
from treeflash.reference.backend import load
from treeflash.testing.models import edit_config

LOADED = LoadConfig()


def kept_costs(backend, target, loaded, folder):
    file = verify_costs.cost_file(backend, verify_costs.model_key(target), loaded, folder)
    return VerifyCosts.kept(backend, file)


def linear_costs(slope):
    """A forward pass takes one second, and `slope` more for each node after the first."""
    return VerifyCosts({size: 1 + slope * (size - 1) for size in SIZES})


def test_costs_follow_measurements_but_not_outliers():
    found = linear_costs(0.1)
    for _ in range(100):
        found.observe(8, 0, 1, 3.4)
    assert found.seconds[8] == pytest.approx(3.4, rel=0.01)
    assert found.seconds[4] > 1.3
    before = found.seconds[8]
    found.observe(8, 0, 1, 1000.0)
    assert found.seconds[8] < 1.2 * before


def test_a_size_between_two_known_ones_changes_them():
    found = linear_costs(0.1)
    assert found.predict([10], [0]) == pytest.approx([1.9])
    for _ in range(200):
        found.observe(10, 0, 1, 3.8)
    assert found.predict([10], [0]) == pytest.approx([3.8], rel=0.01)


def test_other_sizes_change_half_as_much():
    found = linear_costs(0.0)
    found.observe(8, 0, 1, 1.5)
    assert found.seconds[8] == pytest.approx(1 + 0.5 * COST_SMOOTHING)
    assert found.seconds[16] == found.seconds[1] == pytest.approx(1 + 0.25 * COST_SMOOTHING)


@pytest.mark.parametrize(
    "seconds", [{}, {2: 1.0}, {1: 1.0, 8: 1.0, 4: 1.0}, {1: 0.0}, {1: -1.0}, {1: float("nan")}]
)
def test_costs_that_are_not_costs_are_refused(seconds):
    with pytest.raises(ValueError, match=r"ascend from 1|finite and above 0"):
        VerifyCosts(seconds)


@pytest.fixture
def backend(tiny_pair):
    return load(*tiny_pair, LoadConfig())


class Timed:
    """A target whose forward takes a given time, by a clock that it moves itself."""

    name, device, device_name, dtype, vocab_size = "timed", "gpu:0", "Card A", "float32", 100
    inexact: str | None = "rounding may differ"

    max_positions = LONG_PROMPT_TOKENS - 1  # too few to see what long sequences cost

    def __init__(self, monkeypatch, seconds, first=1.5):
        self.verifier = self
        self.seconds = seconds
        self.first = first
        self.prefill_s = 0.0  # of a token
        self.now = 0.0
        self.verified = []
        monkeypatch.setattr(verify_costs.time, "perf_counter", lambda: self.now)

    def open(self, capacity, *, drafts):
        self.length = 0
        return SimpleNamespace(length=0, close=lambda: None)

    def run(self, work):
        (item,) = work
        if isinstance(item, Prefill):
            item.state.length += len(item.token_ids)
            self.length += len(item.token_ids)
            self.now += self.prefill_s * len(item.token_ids)
        else:
            rows = len(item.tree)
            first = rows not in self.verified
            self.verified.append(rows)
            self.now += self.seconds(rows) * (self.first if first else 1)
        return [SampledTokens(np.zeros(1, np.int32))]

    def commit(self, items):
        pass


class TimedAhead(Timed):
    """A device that begins the next token's pass when a token follows another one.

    The pass has run half when it is asked for.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.decoded = 0  # tokens, one after the other

    def run(self, work):
        before, (item,) = self.now, work
        result = super().run(work)
        if isinstance(item, Prefill) or len(item.tree) > 1:
            self.decoded = 0
        elif self.decoded >= verify_costs.FIRST_TOKENS:
            self.now = before + (self.now - before) / 2
        return result

    def commit(self, items):
        self.decoded += 1


def test_plain_decoding_is_timed_as_it_is_decoded(monkeypatch):
    """Drafts must be faster than plain decoding, not than a single pass that nothing precedes."""
    costs = VerifyCosts.measure(TimedAhead(monkeypatch, lambda nodes: 0.01))
    assert costs.seconds[1] == pytest.approx(0.005)
    assert costs.seconds[5] == costs.seconds[16] == pytest.approx(0.01)


def test_a_step_after_15_rows_is_seen(monkeypatch):
    found = VerifyCosts.measure(Timed(monkeypatch, lambda n: 0.01 if n < 16 else 0.02)).seconds
    assert (found[15], found[16]) == pytest.approx((0.01, 0.02))


def test_costs_are_the_best_times_of_each_size_and_lie_on_lines_between(monkeypatch):
    timed = Timed(monkeypatch, lambda nodes: 0.001 if nodes <= 8 else 0.002)
    found = VerifyCosts.measure(timed).seconds
    assert found.keys() == set(SIZES)
    assert found[8] == pytest.approx(0.001)
    assert found[24] == pytest.approx(0.002)
    assert found[4] == pytest.approx(0.001)
    assert found[256] == pytest.approx(0.002)


def test_sizes_that_cannot_pay_are_not_timed_for_long(monkeypatch):
    timed = Timed(monkeypatch, lambda nodes: 0.0625 * nodes)
    timed.device = "cpu"
    found = VerifyCosts.measure(timed).seconds
    assert set(found) == {1, 2, 3, 4, 5}
    assert timed.verified.count(1) == timed.verified.count(10) == 2
    assert max(timed.verified) == 10


def test_a_plain_pass_is_timed_after_a_small_one_as_other_sizes_are(monkeypatch):
    """A slow target is timed in one round after the first."""

    def seconds(rows):
        before = [1, *timed.verified][-2]
        return 0.05 * (1.1 if before > 8 * rows else 1)

    timed = Timed(monkeypatch, seconds)
    timed.device = "cpu"
    assert VerifyCosts.measure(timed).seconds == pytest.approx(dict.fromkeys(SIZES, 0.05))


def test_no_size_is_given_up_for_what_its_first_forward_compiles(monkeypatch):
    timed = Timed(monkeypatch, lambda nodes: 0.01, first=20)
    assert VerifyCosts.measure(timed).seconds == pytest.approx(dict.fromkeys(SIZES, 0.01))


@pytest.mark.parametrize(("length", "readers"), [(LONG_PROMPT_TOKENS, 256), (10**6, 32)])
def test_rows_cost_more_after_a_long_text(monkeypatch, length, readers):
    timed = Timed(monkeypatch, lambda rows: 0.01 + 1e-6 * rows * (timed.length - PROMPT_TOKENS))
    assert VerifyCosts.measure(timed).position_s == {}
    timed.max_positions = length
    found = VerifyCosts.measure(timed)
    assert found.position_s[readers] == pytest.approx(readers * 1e-6)
    assert timed.length == min(length, GPU_PROMPT_TOKENS)
    assert found.seconds == pytest.approx(dict.fromkeys(SIZES, 0.01))
    assert found.predict([8, 8], [0, 8 * 100]) == pytest.approx([0.01, 0.0108])


def test_few_rows_read_a_position_at_another_speed_than_many():
    """A GPU is timed with 1, 8 and 32 rows after 4k positions, and with a step at 32 rows."""
    found = VerifyCosts({1: 1.0, 32: 1.0}, {1: 0.001, 8: 0.001, 32: 0.004})
    reads = [1000.0 * rows for rows in (1, 8, 20, 32, 64)]
    assert found.predict([1, 8, 20, 32, 64], reads) == pytest.approx([2.0, 2.0, 3.5, 5.0, 9.0])
    assert found.predict([16], [16_000.0], 2) == pytest.approx([3.0])  # of 8 rows each
    assert {24, 32, 33, 48} < set(TIMED)


def test_a_gpu_is_timed_with_few_and_with_many_rows_after_a_long_text(monkeypatch):
    def seconds(rows):
        long = timed.length > LONG_PROMPT_TOKENS
        return 0.01 + long * (0.001 if rows <= 8 else 0.003)

    timed = Timed(monkeypatch, seconds)
    timed.max_positions = 10**6
    found = VerifyCosts.measure(timed).position_s
    per_position = 1 / (GPU_PROMPT_TOKENS - PROMPT_TOKENS)
    assert found == pytest.approx(
        {1: 0.001 * per_position, 8: 0.001 * per_position, 32: 0.003 * per_position}
    )


def test_a_slow_gpu_reads_less_of_the_long_text(monkeypatch):
    timed = Timed(monkeypatch, lambda rows: 0.01 + 1e-6 * rows * (timed.length - PROMPT_TOKENS))
    timed.max_positions, timed.prefill_s = 10**6, 1 / 256
    assert VerifyCosts.measure(timed).position_s[8] == pytest.approx(8e-6)
    assert timed.length == PROMPT_TOKENS + 1024


def test_rows_beyond_the_largest_size_cost_as_the_last_ones_do():
    found = VerifyCosts({1: 1.0, 2: 1.5, 4: 2.5})
    assert found.predict([3, 10], [0, 0]) == pytest.approx([2.0, 5.5])
    assert VerifyCosts({1: 1.0}).predict([1, 3], [0, 0]) == pytest.approx([1.0, 1.0])


def test_several_sequences_take_additional_time():
    """The costs hold for every number of rows; 3 and 4 sequences share one entry."""
    found = linear_costs(0.1)
    found.observe(8, 0, 3, 1.7 + 0.4)
    assert found.predict([8, 3], [0, 0], 4) == pytest.approx([1.7 + 0.4, 1.2 + 0.4])
    for _ in range(200):
        found.observe(8, 0, 3, 1.7 + 0.6)
    assert found.predict([8, 3], [0, 0], 4) == pytest.approx([1.7 + 0.6, 1.2 + 0.6], rel=0.01)
    assert found.predict([8], [0], 2) == found.predict([8], [0]) == pytest.approx([1.7])


def test_roots_alone_cost_less_than_trees_of_several_texts():
    """A batch without trees needs no masks; what one kind costs says little about the other."""
    found = linear_costs(0.1)
    found.observe(3, 0, 3, 1.2 + 0.2)
    assert found.predict([3, 8], [0, 0], 3) == pytest.approx([1.4, 1.9]), "trees are not known yet"
    found.observe(8, 0, 3, 1.7 + 0.6)
    assert found.predict([3, 8], [0, 0], 3) == pytest.approx([1.2 + 0.2, 1.7 + 0.6])


def test_trees_that_were_expensive_once_are_tried_again():
    """Otherwise a pass that a disturbance slowed down would be the last one with trees."""
    found = linear_costs(0.1)
    found.observe(3, 0, 3, 1.2 + 0.2)
    found.observe(8, 0, 3, 1.7 + 1.0)
    for _ in range(300):
        found.observe(3, 0, 3, 1.2 + 0.2)
    assert found.predict([3, 8], [0, 0], 3) == pytest.approx([1.4, 1.9], rel=0.01)


@pytest.mark.parametrize("seconds", [1e-9, 1e9])
def test_an_outlier_of_several_texts_counts_as_the_shortest_or_longest_plausible(seconds):
    found = linear_costs(0.1)
    for _ in range(100):
        found.observe(8, 0, 3, seconds)
    cost = float(found.predict([8], [0], 3)[0])
    assert 1.7 / OUTLIER_FACTOR <= cost < np.inf


def test_a_pass_that_fails_leaves_no_state_open(monkeypatch):
    closed = []

    class Small(Timed):
        def open(self, capacity, *, drafts):
            state = super().open(capacity, drafts=drafts)
            state.close = lambda: closed.append(True)
            return state

    def seconds(rows):
        if rows == 64:
            raise MemoryError
        return 0.01

    with pytest.raises(MemoryError):
        VerifyCosts.measure(Small(monkeypatch, seconds))
    assert closed == [True]


def test_costs_are_measured_on_a_target(backend):
    found = VerifyCosts.measure(backend).seconds
    assert found[1] > 0
    assert set(found) <= set(SIZES)


@pytest.fixture
def target(tiny_pair, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_pair[0], tmp_path / "target")


@pytest.fixture
def measured(monkeypatch, target, tmp_path):
    """Whether costs are measured, not read, after a change, where 10 ms were measured before.

    A change sets attributes of the target, and calls `change`.
    """

    def measured(change=lambda: None, loaded=LOADED, **attributes):
        timed = Timed(monkeypatch, lambda nodes: 0.01)
        first = kept_costs(timed, target, LOADED, tmp_path / "costs")
        assert first.seconds[1] == pytest.approx(0.01)
        timed.seconds = lambda nodes: 0.02
        vars(timed).update(attributes)
        change()
        found = kept_costs(timed, target, loaded, tmp_path / "costs")
        assert found == first or found.seconds[1] == pytest.approx(0.02)
        return found != first

    return measured


def test_costs_are_remembered(measured):
    assert not measured()


def test_a_gpu_is_not_timed_without_a_word(monkeypatch, target, tmp_path, caplog):
    for _ in range(2):
        timed = Timed(monkeypatch, lambda nodes: 0.01)
        kept_costs(timed, target, LOADED, tmp_path / "costs")
    line = "timing forward passes on Card A for the budget auto, once for this model"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_costs_belong_to_the_hardware_not_to_its_index(measured):
    assert not measured(device="gpu:1")
    assert measured(device_name="Card B")


def test_costs_belong_to_the_dtype(measured):
    assert measured(dtype="bfloat16")


@pytest.mark.parametrize("loaded", [LoadConfig(cuda_graphs=False), LoadConfig(kv_bits=8)])
def test_costs_belong_to_the_way_of_loading(measured, loaded):
    assert measured(loaded=loaded)


def test_costs_belong_to_exact_mode_also_where_it_is_the_default(measured):
    assert measured(inexact=None)


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "LD_PRELOAD"])
def test_costs_belong_to_the_threads_and_to_a_preloaded_library(measured, monkeypatch, variable):
    assert measured(lambda: monkeypatch.setenv(variable, "7"))


def test_costs_belong_to_the_version(measured, monkeypatch):
    """Another version may have faster kernels."""
    name = "treeflash.decoding.verify_costs.version"
    assert measured(lambda: monkeypatch.setattr(name, lambda package: f"{package} 7"))


def test_costs_belong_to_the_version_of_macos(measured, monkeypatch):
    """MLX computes with libraries of macOS."""
    mac_ver = verify_costs.platform.mac_ver
    name = "treeflash.decoding.verify_costs.platform.mac_ver"
    assert measured(lambda: monkeypatch.setattr(name, lambda: ("26.2", *mac_ver()[1:])))


def test_costs_belong_to_the_kernels_that_are_used_not_to_their_races(
    monkeypatch, target, tmp_path
):
    timed = Timed(monkeypatch, lambda nodes: 0.01)
    found = []
    for verdict in ("used, 1.20 times", "used, 1.21 times", "not used, 1.10 times"):
        report = DeviceReport(kernels={"products": {"5 rows": verdict}})
        timed.device_report = lambda report=report: report
        found.append(kept_costs(timed, target, LOADED, tmp_path / "costs").seconds[1])
        timed.seconds = lambda nodes: 0.02
    assert found == pytest.approx([0.01, 0.01, 0.02])


def test_costs_belong_to_the_targets_configuration(measured, target):
    """Weights of one size may belong to another architecture."""
    assert measured(lambda: edit_config(target, lambda config: config.update(rms_norm_eps=1)))


def test_costs_belong_to_the_targets_weights(measured, target):
    def change():
        with (target / "model.safetensors").open("ab") as file:
            file.write(b"0")

    assert measured(change)


@pytest.mark.parametrize(
    "content",
    [
        "torn",
        "",
        "[]",
        "3",
        "{}",
        '{"1": 1}',
        '{"seconds": {"1": 1}}',
        *(
            f'{{"seconds": {seconds}, "position_s": {{}}}}'
            for seconds in ("3", '{"1": 0}', '{"1": null}', '{"1": NaN}', '{"8": 1}', '{"x": 1}')
        ),
        *(
            f'{{"seconds": {{"1": 1}}, "position_s": {{"1": {cost}}}}}'
            for cost in ("-1", "NaN", "null")
        ),
    ],
)
def test_a_file_without_usable_costs_is_measured_anew(measured, tmp_path, content):
    def damage():
        (file,) = (tmp_path / "costs").iterdir()
        file.write_text(content, encoding="utf-8")

    assert measured(damage)
    (file,) = (tmp_path / "costs").iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["seconds"]["1"] == pytest.approx(0.02)


def test_a_folder_that_cannot_be_written_only_costs_time(monkeypatch, target, tmp_path):
    (tmp_path / "costs").write_text("a file", encoding="utf-8")
    timed = Timed(monkeypatch, lambda nodes: 0.01)
    found = kept_costs(timed, target, LOADED, tmp_path / "costs")
    assert found.seconds[1] == pytest.approx(0.01)


def test_a_disk_that_is_full_is_left_without_pieces(monkeypatch, target, tmp_path):
    timed = Timed(monkeypatch, lambda nodes: 0.01)
    with failing(Path, "replace", OSError(errno.ENOSPC, "No space left on device")):
        kept_costs(timed, target, LOADED, tmp_path / "costs")
    assert not list((tmp_path / "costs").iterdir())
