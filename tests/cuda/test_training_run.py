"""The folder of a run: what resumes, what is refused, and what a full disk leaves."""

import json
import os
import resource
import shutil
import signal
import stat
import sys
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from failures import failing
from small_training import texts_of, train_steps

from treeflash.drafters.folder import read_tensors
from treeflash.errors import ConfigError
from treeflash.testing import require

require("torch")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from treeflash_cuda.training import loop
from treeflash_cuda.training.run import CHECKPOINT, TrainingRun

OTHER = texts_of((5, 9), (9, 5))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def run(target, folder):
    """Train in the folder of the test; return the numbers of the steps."""

    def run(target=target, texts=None, **changes):
        return [record["step"] for record in train_steps(target, folder, texts, **changes)]

    return run


@pytest.fixture(scope="module")
def runs(target, tmp_path_factory):
    """The folders of a run that was interrupted after its first save, and of one that has ended."""
    folder = tmp_path_factory.mktemp("runs")
    train_steps(target, folder / "stopped", stop=2)
    train_steps(target, folder / "finished")
    return folder


@pytest.fixture
def stopped(runs, folder):
    """A copy of the interrupted run in the folder of the test."""
    shutil.copytree(runs / "stopped", folder)


@pytest.fixture
def finished(runs, folder):
    """A copy of the run that has ended in the folder of the test."""
    shutil.copytree(runs / "finished", folder)


@pytest.mark.usefixtures("stopped")
def test_a_save_or_a_line_of_the_log_that_was_cut_short_does_not_matter(run, folder):
    shutil.copytree(folder / "state", folder / "state.old")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert run() == [3, 4, 5, 6]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 6


def test_the_checkpoint_is_written_before_the_last_state(run, folder):
    with failing(loop, "export", KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run(save_every=6)
    assert not (folder / "state").exists()


@pytest.fixture
def send(monkeypatch):
    """Send signals in a step of the runs of the test."""
    take_step = loop.take_step

    def send(number, *signals):
        def take_interrupted_step(step, *arguments):
            for each in signals if step + 1 == number else ():
                signal.raise_signal(each)
            return take_step(step, *arguments)

        monkeypatch.setattr(loop, "take_step", take_interrupted_step)

    return send


@pytest.fixture
def on_interrupt():
    """Set the handler of Ctrl-C until the test ends; shells turn it off for background jobs."""
    before = signal.getsignal(signal.SIGINT)
    yield partial(signal.signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "hint", "end"),
    [
        (signal.SIGINT, "; press Ctrl-C again to stop", KeyboardInterrupt),
        (signal.SIGTERM, "$", SystemExit),
    ],
)
@pytest.mark.usefixtures("stopped")
def test_a_signal_loses_no_step(number, hint, end, run, folder, runs, send, on_interrupt):
    """The running step ends, and its state and drafter are saved, unless Ctrl-C follows."""
    on_interrupt(signal.default_int_handler)
    cases = ((number, signal.SIGINT), KeyboardInterrupt, 2), ((number,), end, 3)
    for signals, raised, step in cases:
        send(3, *signals)
        with (
            pytest.warns(UserWarning, match=f"saved after this step{hint}"),
            pytest.raises(raised) as stop,
        ):
            run()
        assert json.loads((folder / "state" / "run.json").read_text())["step"] == step
    assert getattr(stop.value, "code", 128 + number) == 128 + number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "After 3 of 6 steps" in (folder / "README.md").read_text()
    assert run() == [4, 5, 6]
    expected, found = (read_tensors(x) for x in (runs / "finished", folder))
    assert all(np.array_equal(found[name], x) for name, x in expected.items())


@pytest.mark.usefixtures("stopped")
def test_an_interrupt_that_a_shell_has_turned_off_stays_off(run, send, on_interrupt):
    on_interrupt(signal.SIG_IGN)
    send(3, signal.SIGINT)
    assert run() == [3, 4, 5, 6]


@pytest.mark.usefixtures("stopped")
def test_a_drafter_without_a_state_is_not_overwritten(run, folder):
    (folder / "state").rename(folder / "state.new")  # an interrupted first save
    assert run(stop=2)
    shutil.rmtree(folder / "state")
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="would overwrite it; give another --output"):
        run()
    assert (folder / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
@pytest.mark.usefixtures("finished")
def test_a_finished_run_restores_a_deleted_file_of_its_checkpoint(name, run, folder):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    assert run() == []
    assert (folder / name).read_bytes() == content


@pytest.mark.usefixtures("finished")
def test_a_finished_run_is_left_as_it_is_without_its_target(run, folder, target, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(target=tmp_path / "absent" / target.name) == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("finished", {"steps": 7}, "with steps 6, not 7; .* another --output, .*train --init"),
        ("finished", {"texts": OTHER}, "on other responses; use the same files, .*train --init"),
        ("stopped", {"steps": 7}, "has a run with steps 6, not 7"),
        ("stopped", {"layers": 1}, "has a run with layers 2, not 1"),
        ("stopped", {"init": "random"}, "has a run with init target, not random"),
        ("stopped", {"top_tokens": 4}, "has a run with top_tokens 8, not 4"),
        ("stopped", {"texts": OTHER}, "has a run on other responses; use the same files"),
        ("stopped", {"target": "other"}, "has a run with target {target}, not other"),
    ],
)
def test_a_run_does_not_go_on_with_what_changed(
    kind, changes, message, run, runs, folder, target, tmp_path
):
    shutil.copytree(runs / kind, folder)
    if "target" in changes:
        changes = {"target": shutil.copytree(target, tmp_path / changes["target"])}
    with pytest.raises(ConfigError, match=message.format(target=target.name)):
        run(**changes)


@pytest.mark.sample(5)
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"{}", "half"])
@pytest.mark.parametrize("name", ["run.json", "pytorch_model.bin", "optimizer.bin"])
@pytest.mark.usefixtures("stopped")
def test_a_damaged_state_is_named(name, content, run, folder):
    path = folder / "state" / name
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ConfigError, match="state is damaged, so training cannot be resumed"):
        run()


@pytest.mark.parametrize("line", ["\0\0\n", "{}\n", "3\n"])
@pytest.mark.usefixtures("stopped")
def test_a_damaged_log_is_named(line, run, folder):
    (folder / "log.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=r"log\.jsonl is damaged, so training cannot be resumed"):
        run()


@pytest.mark.sample(2)
@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
@pytest.mark.parametrize("size", [10, 500, 40_000, 120_000, 200_000])
def test_a_full_disk_is_one_clear_error(size, cache_gb, run, folder, monkeypatch):
    """No file may be larger than `size`, as a stand-in for a disk without space."""
    # Python would leave modules' bytecode that the limit has cut off.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(ConfigError, match=r"run/.* cannot be written") as caught:
            run(cache_gb=cache_gb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert run(cache_gb=cache_gb)[-1] == 6


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.usefixtures("stopped")
def test_all_processes_resume_from_the_state_that_the_first_one_puts_back(folder, first):
    """An interrupted save had moved it away."""
    (folder / "state").rename(folder / "state.old")

    class Process:
        is_main_process = first

        def wait_for_everyone(self):
            if not first:
                (folder / "state.old").rename(folder / "state")

        def load_state(self, folder):
            pass

    with closing(TrainingRun(folder, Process(), {}, "")) as run:
        assert run.resume() == 2


def test_tensorboard_shows_each_step_once(run, folder):
    run(stop=3)  # beyond the state after step 2
    run()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(record["step"], pytest.approx(record["loss"])) for record in log]
    assert [event.step for event in events.Scalars("validation/chain_corrected")] == [2, 4, 6]
    assert len(events.Scalars("validation/kl_marginal/4")) == 3


def test_written_files_follow_the_umask(run, folder):
    """Safetensors makes files that only their owner can read."""
    before = os.umask(0o027)
    try:
        run(steps=1)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in CHECKPOINT}
    assert modes == dict.fromkeys(CHECKPOINT, 0o640)
