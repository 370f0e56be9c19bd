"""The cost of verifying trees: how passes correct it, how it is measured, kept and read back."""

import errno
import json
import os
import platform
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from failures import failing

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import DeviceReport, Pass, Prefill
from treeflash.decoding.sampling import SampledTokens
from treeflash.decoding.verify_costs import (
    NEAREST,
    PROMPT_TOKENS,
    REMEMBERED,
    SIZES,
    CostFile,
    VerifyCosts,
    cost_file,
    model_key,
)
from treeflash.reference.backend import load
from treeflash.testing.models import edit_config

LOADED = LoadConfig()


def true_s(rows):
    """The seconds of a pass on the idle machine: a plain pass takes 25 ms, 16 rows take 46 ms."""
    return 0.025 * (1 + 0.055 * (rows - 1))


def table(factor=lambda rows: 1):
    """Costs that are wrong by a factor, which depends on the size."""
    return VerifyCosts({size: factor(size) * true_s(size) for size in SIZES if size <= 64})


def busy(rows):
    """The error of a busy machine, in the shape that one had: 8 rows cost 5 times a plain pass."""
    return 0.385 / 0.025 if rows == 1 else 0.23 * min(rows, 8) / true_s(rows)


def passes(costs, rows, slow=1.0, sequences=1, times=1):
    """Passes over this number of rows, so much slower than on the idle machine."""
    for _ in range(times):
        costs.observe(rows, 0, sequences, slow * true_s(rows))


def error(costs, rows, sequences=1):
    """How many times the true seconds a pass is expected to take."""
    return float(costs.predict([rows], [0], sequences)[0]) / true_s(rows)


class TestCorrections:
    @pytest.mark.parametrize("factor", [0.1, 10, 100])
    @pytest.mark.parametrize("rows", [1, 8, 20])
    def test_one_pass_corrects_a_table_that_is_wrong_everywhere(self, factor, rows):
        costs = table(lambda rows: factor)
        passes(costs, rows)
        assert [error(costs, n) for n in (8, 10, 32, 64)] == pytest.approx([1] * 4)

    @pytest.mark.parametrize("slow", [1.2, 3, 1e9])
    def test_a_disturbed_pass_changes_nothing(self, slow):
        costs = table()
        passes(costs, 8, times=12)
        passes(costs, 8, slow)
        passes(costs, 8)
        passes(costs, 16, slow)
        assert [error(costs, n) for n in (8, 16)] == pytest.approx([1, 1])

    @pytest.mark.parametrize("slow", [1e-9, 0.1])
    def test_a_pass_that_seems_too_fast_counts_until_others_are_nearer(self, slow):
        costs = table()
        passes(costs, 8, times=12)
        passes(costs, 8, slow)
        passes(costs, 8, times=REMEMBERED)
        assert [error(costs, n) for n in (5, 8, 16)] == pytest.approx([1] * 3)

    def test_costs_follow_a_machine_that_changes(self):
        costs = table()
        passes(costs, 8, times=30)
        passes(costs, 8, 3, times=12)
        assert [error(costs, n) for n in (8, 32)] == pytest.approx([3] * 2)

    def test_what_no_pass_showed_is_as_wrong_as_what_is_nearest(self):
        costs = table()
        passes(costs, 4, 2, times=9)
        passes(costs, 32, 4, times=9)
        assert [error(costs, n) for n in (2, 24, 64)] == pytest.approx([2, 4, 4])
        passes(costs, 1, 3)
        assert [error(costs, n) for n in (1, 2, 24, 64)] == pytest.approx([3, 2, 4, 4])

    def test_passes_of_long_ago_do_not_count(self):
        costs = table()
        passes(costs, 32, 4, times=NEAREST - 1)  # too few to change the table
        passes(costs, 1, times=100)
        assert error(costs, 32) == pytest.approx(1)

    def test_a_batch_has_costs_of_its_own(self):
        """3 and 4 sequences share them; those of single trees stand in until a pass is seen."""
        costs = table()
        passes(costs, 8, 2)
        assert error(costs, 8, sequences=4) == pytest.approx(2)
        passes(costs, 8, 5, sequences=3)
        assert error(costs, 8, sequences=4) == pytest.approx(5)
        assert error(costs, 8) == pytest.approx(2)

    def test_a_batch_of_roots_costs_less_than_one_with_a_tree(self):
        """It needs no masks."""
        costs = table()
        passes(costs, 3, 2, sequences=3)
        assert error(costs, 8, sequences=3) == pytest.approx(2), "trees are not known yet"
        passes(costs, 8, 5, sequences=3)
        assert [error(costs, n, sequences=3) for n in (3, 8)] == pytest.approx([2, 5])
        passes(costs, 3, 2, sequences=3, times=100)
        assert error(costs, 8, sequences=3) == pytest.approx(2), "trees must be tried again"

    @pytest.mark.parametrize(("slow", "expected"), [(3, 1), (0.1, 0.1)])
    def test_a_plain_pass_that_none_showed_is_not_thought_slower_than_the_table_says(
        self, slow, expected
    ):
        """Else it would never be run, and drafts would seem to pay."""
        costs = table()
        passes(costs, 8, slow)
        assert [error(costs, n) for n in (1, 8)] == pytest.approx([expected, slow])
        passes(costs, 1, slow)
        assert error(costs, 1) == pytest.approx(slow)


class TestPrediction:
    def test_rows_beyond_the_largest_size_cost_as_the_last_ones_do(self):
        found = VerifyCosts({1: 1.0, 2: 1.5, 4: 2.5})
        assert found.predict([3, 10], [0, 0]) == pytest.approx([2.0, 5.5])
        assert VerifyCosts({1: 1.0}).predict([1, 3], [0, 0]) == pytest.approx([1.0, 1.0])

    def test_few_rows_read_a_position_at_another_speed_than_many(self):
        """A GPU is timed with 1, 8 and 32 rows after 4k positions, and with a step at 32 rows."""
        found = VerifyCosts({1: 1.0, 32: 1.0}, {1: 0.001, 8: 0.001, 32: 0.004})
        reads = [1000.0 * rows for rows in (1, 8, 20, 32, 64)]
        assert found.predict([1, 8, 20, 32, 64], reads) == pytest.approx([2.0, 2.0, 3.5, 5.0, 9.0])
        assert found.predict([16], [16_000.0], 2) == pytest.approx([3.0])  # of 8 rows each
        assert {24, 32, 33, 48} < set(SIZES)

    @pytest.mark.parametrize(
        "seconds", [{}, {2: 1.0}, {1: 1.0, 8: 1.0, 4: 1.0}, {1: 0.0}, {1: -1.0}, {1: float("nan")}]
    )
    def test_costs_that_are_not_costs_are_refused(self, seconds):
        with pytest.raises(ValueError, match=r"ascend from 1|finite and above 0"):
            VerifyCosts(seconds)


class Timed:
    """A target whose forward takes a given time, by a clock that it moves itself."""

    name, device, device_name, dtype, vocab_size = "timed", "gpu:0", "Card A", "float32", 100
    inexact: str | None = "rounding may differ"

    max_positions = 255  # too few to see what long sequences cost

    def __init__(self, seconds, first=1.5):
        self.verifier = self
        self.seconds = seconds
        self.first = first
        self.prefill_s = 0.0  # of a token
        self.now = 0.0
        self.verified = []

    def clock(self):
        return self.now

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
        return Pass([SampledTokens(np.zeros(1, np.int32))])

    def commit(self, verified, paths):
        pass


class TimedAhead(Timed):
    """A device that begins the next token's pass when a token follows another one.

    The pass has run half when it is asked for.
    """

    decoded = 0  # tokens, one after the other

    def run(self, work):
        before, (item,) = self.now, work
        result = super().run(work)
        if isinstance(item, Prefill) or len(item.tree) > 1:
            self.decoded = 0
        elif self.decoded >= 2:
            self.now = before + (self.now - before) / 2
        return result

    def commit(self, verified, paths):
        self.decoded += 1


def measure(timed):
    return VerifyCosts.measure(timed, timed.clock)


class TestMeasuring:
    def test_plain_decoding_is_timed_as_it_is_decoded(self):
        """Drafts must be faster than plain decoding, not than a pass that nothing precedes."""
        costs = measure(TimedAhead(lambda nodes: 0.01))
        assert costs.seconds[1] == pytest.approx(0.005)
        assert costs.seconds[5] == costs.seconds[16] == pytest.approx(0.01)

    @pytest.mark.parametrize("step", [6, 9, 16, 33])
    def test_steps_are_seen_and_the_best_times_count(self, step):
        found = measure(Timed(lambda n: 0.01 if n < step else 0.02)).seconds
        assert found == pytest.approx({n: 0.01 if n < step else 0.02 for n in SIZES})

    def test_a_smaller_tree_takes_no_longer_than_a_larger_one(self):
        """Else something disturbed its passes."""
        timed = Timed(lambda rows: 0.002 if rows < 5 else 0.01 if rows < 64 else 0.008)
        found = measure(timed).seconds
        assert [found[n] for n in (4, 5, 48, 64)] == pytest.approx([0.002, 0.008, 0.008, 0.008])

    def test_no_size_is_given_up_for_what_its_first_forward_compiles(self):
        found = measure(Timed(lambda nodes: 0.01, first=20)).seconds
        assert found == pytest.approx(dict.fromkeys(SIZES, 0.01))

    def test_sizes_that_cannot_pay_are_not_timed_for_long(self):
        timed = Timed(lambda nodes: 0.0625 * nodes)
        timed.device = "cpu"
        found = measure(timed).seconds
        assert timed.verified.count(1) == timed.verified.count(10) == 2
        assert max(timed.verified) == 10
        # They follow the line through what was timed: the machine may have been busy.
        assert found == pytest.approx({size: 0.0625 * size for size in SIZES})

    def test_a_plain_pass_is_timed_after_a_small_one_as_other_sizes_are(self):
        """A slow target is timed in one round after the first."""

        def seconds(rows):
            before = [1, *timed.verified][-2]
            return 0.05 * (1.1 if before > 8 * rows else 1)

        timed = Timed(seconds)
        timed.device = "cpu"
        assert measure(timed).seconds == pytest.approx(dict.fromkeys(SIZES, 0.05))

    @pytest.mark.parametrize(("length", "readers"), [(256, 256), (10**6, 32)])
    def test_rows_cost_more_after_a_long_text(self, length, readers):
        timed = Timed(lambda rows: 0.01 + 1e-6 * rows * (timed.length - PROMPT_TOKENS))
        assert measure(timed).position_s == {}
        timed.max_positions = length
        found = measure(timed)
        assert found.position_s[readers] == pytest.approx(readers * 1e-6)
        assert timed.length == min(length, 4096)
        assert found.seconds == pytest.approx(dict.fromkeys(SIZES, 0.01))
        assert found.predict([8, 8], [0, 8 * 100]) == pytest.approx([0.01, 0.0108])

    def test_a_gpu_is_timed_with_few_and_with_many_rows_after_a_long_text(self):
        def seconds(rows):
            return 0.01 + (timed.length > 256) * (0.001 if rows <= 8 else 0.003)

        timed = Timed(seconds)
        timed.max_positions = 10**6
        per_position = 1 / (4096 - PROMPT_TOKENS)
        expected = {1: 0.001, 8: 0.001, 32: 0.003}
        assert measure(timed).position_s == pytest.approx(
            {rows: extra * per_position for rows, extra in expected.items()}
        )

    def test_a_slow_gpu_reads_less_of_the_long_text(self):
        timed = Timed(lambda rows: 0.01 + 1e-6 * rows * (timed.length - PROMPT_TOKENS))
        timed.max_positions, timed.prefill_s = 10**6, 1 / 256
        assert measure(timed).position_s[8] == pytest.approx(8e-6)
        assert timed.length == PROMPT_TOKENS + 1024

    def test_a_pass_that_fails_leaves_no_state_open(self):
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
            measure(Small(seconds))
        assert closed == [True]

    def test_costs_are_measured_on_a_target(self, tiny_pair):
        found = VerifyCosts.measure(load(*tiny_pair, LOADED)).seconds
        assert found[1] > 0
        assert set(found) <= set(SIZES)


@pytest.fixture
def target(tiny_pair, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_pair[0], tmp_path / "target")


def kept_costs(timed, target, loaded=LOADED):
    file = cost_file(timed, model_key(target), loaded, target.parent / "costs")
    return VerifyCosts.kept(timed, file, timed.clock)


@pytest.fixture
def measured(target):
    """Whether costs are measured, not read, after a change, where 10 ms were measured before.

    A change sets attributes of the target, and calls `change`.
    """

    def measured(change=lambda: None, loaded=LOADED, **attributes):
        timed = Timed(lambda nodes: 0.01)
        first = kept_costs(timed, target)
        assert first.seconds[1] == pytest.approx(0.01)
        timed.seconds = lambda nodes: 0.02
        vars(timed).update(attributes)
        change()
        found = kept_costs(timed, target, loaded)
        assert found == first or found.seconds[1] == pytest.approx(0.02)
        return found != first

    return measured


class TestKeeping:
    def test_costs_belong_to_the_hardware_and_the_way_of_loading(self, measured):
        """Not to the index of the device."""
        assert not measured(device="gpu:1")
        assert measured(device_name="Card B")
        assert measured(dtype="bfloat16")
        assert measured(inexact=None)
        for loaded in ({"cuda_graphs": False}, {"kv_bits": 8}, {"bits": 16}, {"draft_bits": 16}):
            assert measured(loaded=LoadConfig(**loaded))
        assert not measured(loaded=LoadConfig(device="gpu:1"))

    @pytest.mark.parametrize("macos", ["26.2", ""])
    def test_a_mac_is_timed_once_whatever_network_names_it(self, measured, monkeypatch, macos):
        """Other machines have names of their own, of which several may share a folder."""
        monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), ""))
        monkeypatch.setattr(platform, "node", lambda: "at home")
        moved = partial(monkeypatch.setattr, platform, "node", lambda: "in the office")
        assert measured(moved) == (not macos)

    def test_a_gpu_is_not_timed_without_a_word(self, target, caplog):
        for _ in range(2):
            kept_costs(Timed(lambda nodes: 0.01), target)
        line = "timing forward passes on Card A for the budget auto, once for this model"
        assert [record.getMessage() for record in caplog.records] == [line]

    def test_costs_belong_to_the_facts_that_passed_checks_depend_on(self, measured, monkeypatch):
        """`test_probe.py` has each of them."""
        assert measured(lambda: monkeypatch.setenv("OMP_NUM_THREADS", "7"))

    def test_costs_belong_to_the_kernels_that_are_used_not_to_their_races(self, target):
        timed = Timed(lambda nodes: 0.01)
        found = []
        for verdict in ("used, 1.20 times", "used, 1.21 times", "not used, 1.10 times"):
            report = DeviceReport(kernels={"products": {"5 rows": verdict}})
            timed.device_report = lambda report=report: report
            found.append(kept_costs(timed, target).seconds[1])
            timed.seconds = lambda nodes: 0.02
        assert found == pytest.approx([0.01, 0.01, 0.02])

    @pytest.mark.parametrize(
        "change",
        [
            # Weights of one size may belong to another architecture.
            lambda folder: edit_config(folder, lambda config: config.update(rms_norm_eps=1)),
            lambda folder: (folder / "model.safetensors").open("ab").write(b"0"),
        ],
        ids=["configuration", "weights"],
    )
    def test_costs_belong_to_the_targets_files(self, measured, target, change):
        assert measured(partial(change, target))

    @pytest.mark.parametrize(
        "content",
        [
            *("torn", "", "[]", "3", "{}", '{"1": 1}', '{"seconds": {"1": 1}}'),
            *(
                f'{{"seconds": {seconds}, "position_s": {{}}}}'
                for seconds in ("3", '{"1": 0}', '{"1": null}', '{"1": NaN}', '{"8": 1}', '{"x":1}')
            ),
            *(
                f'{{"seconds": {{"1": 1}}, "position_s": {{"1": {cost}}}}}'
                for cost in ("-1", "NaN", "null")
            ),
        ],
    )
    def test_a_file_without_usable_costs_is_measured_anew(self, measured, tmp_path, content):
        def damage():
            (file,) = (tmp_path / "costs").iterdir()
            file.write_text(content, encoding="utf-8")

        assert measured(damage)
        (file,) = (tmp_path / "costs").iterdir()
        assert json.loads(file.read_text(encoding="utf-8"))["seconds"]["1"] == pytest.approx(0.02)

    def test_a_folder_or_a_disk_that_cannot_be_written_only_costs_time(self, target, tmp_path):
        with failing(Path, "replace", OSError(errno.ENOSPC, "No space left on device")):
            kept_costs(Timed(lambda nodes: 0.01), target)
        assert not list((tmp_path / "costs").iterdir())
        (tmp_path / "costs").rmdir()
        (tmp_path / "costs").write_text("a file", encoding="utf-8")
        found = kept_costs(Timed(lambda nodes: 0.01), target)
        assert found.seconds[1] == pytest.approx(0.01)


@pytest.fixture
def file(tmp_path):
    return CostFile(tmp_path / "costs" / "a.json", lambda: True)


def process(file, sizes, slow=1.0, sequences=1, *, own=True):
    """Run passes over these sizes in turn in a process that reads the file, its own or not."""
    costs = file.read()
    costs.file = CostFile(file.path, lambda: own)
    for number in range(2 * REMEMBERED):
        passes(costs, sizes[number % len(sizes)], slow, sequences)
    return costs


class TestHealing:
    @pytest.mark.parametrize("factor", [lambda rows: 10, busy, lambda n: 1 if n == 1 else 0.1])
    def test_the_table_and_its_file_are_corrected(self, file, factor):
        file.write(table(factor))
        process(file, (1, 8, 12, 5, 24))
        found = file.read()
        shape = [error(found, n) / error(found, 1) for n in (5, 8, 16, 24)]
        assert shape == pytest.approx([1] * 4, rel=0.4)
        assert error(found, 1) < 1.1

    @pytest.mark.parametrize(
        ("factor", "passed"),
        [
            pytest.param(1, {"sizes": (1, 8, 16), "slow": 1.2}, id="a busy process"),
            pytest.param(1, {"sizes": (1, 8, 16), "slow": 3.0}, id="a very busy process"),
            pytest.param(10, {"sizes": (4, 8, 16), "sequences": 4}, id="batches"),
            pytest.param(10, {"sizes": (1, 8), "own": False}, id="other threads"),
        ],
    )
    def test_what_says_nothing_of_the_idle_machine_does_not_change_the_file(
        self, file, factor, passed
    ):
        file.write(table(lambda rows: factor))
        before = file.path.read_text()
        process(file, **passed)
        assert file.path.read_text() == before

    def test_a_wrong_cost_of_positions_is_corrected_with_the_others(self, file):
        """Costs of rows alone would be corrected again and again, to nothing."""
        file.write(VerifyCosts(table().seconds, {64: 0.01}))
        costs = file.read()
        costs.file = file
        for number in range(4 * REMEMBERED):
            rows = (1, 5, 8)[number % 3]
            costs.observe(rows, 100 * rows, 1, true_s(rows))
        found = file.read()
        predicted = found.predict([1, 5, 8], [100, 500, 800]) / [true_s(n) for n in (1, 5, 8)]
        assert predicted == pytest.approx([1] * 3, rel=0.5)
        assert min(found.seconds.values()) > true_s(1) / 10

    def test_disturbed_passes_do_not_change_the_file(self, file):
        file.write(table())
        before, costs = file.path.read_text(), file.read()
        costs.file = file
        for number in range(2 * REMEMBERED):
            passes(costs, 8 if number % 5 else 4, 9 if number % 4 == 3 else 1)
        assert file.path.read_text() == before

    def test_a_correction_of_the_table_counts_once(self, file):
        costs = table(busy)
        for _ in range(REMEMBERED):
            passes(costs, 1)
            passes(costs, 8)
            passes(costs, 12, 2, sequences=4)
        assert [error(costs, 1), error(costs, 8)] == pytest.approx([1, 1], rel=0.01)
        assert error(costs, 12, sequences=4) == pytest.approx(2, rel=0.2)

    def test_the_file_says_what_it_has_how_old_it_is_and_how_to_measure_again(self, file):
        assert "first text" in file.describe()
        file.write(table())
        os.utime(file.path, (0, 0))
        assert file.describe().startswith("1 row 25 ms, 8 rows ")
        assert "corrected 1970-01-01 00:00 UTC" in file.describe()
        assert f"delete {file.path} to measure again" in file.describe()
