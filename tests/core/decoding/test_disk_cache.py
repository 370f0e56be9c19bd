"""States that survive the process: texts, shared files, limits, and what a folder may do."""

import errno
import os
import threading
from dataclasses import replace

import pytest
from failures import failing
from recordings import recording
from servers import PATIENCE
from stored_states import Process, answered, plain, prompt_of, stored_pair

from treeflash.config import DecodeConfig
from treeflash.decoding import Request, SchedulerConfig, state_files
from treeflash.reference.verifier import State

FAMILIES = ("qwen3", "qwen3_5")  # the second has recurrent layers


each_family = pytest.mark.parametrize("pair", FAMILIES, indirect=True)


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    family = getattr(request, "param", "qwen3_5")
    return stored_pair(tmp_path_factory.mktemp(family), family)


@each_family
@pytest.mark.parametrize("method", ["treeflash", "ar"])
def test_a_conversation_goes_on_after_a_restart(pair, tmp_path, method):
    """The whole state is restored, and the text is what an uninterrupted process writes."""
    first = prompt_of(30)
    with Process(pair, tmp_path) as process:
        answer, cached = process.answer(first, method=method)
        assert cached == (0, 0)
        second = [*first, *answer, *prompt_of(9, seed=1)]
        expected, (in_memory, _) = process.answer(second, method=method)
        assert in_memory == len(first) + len(answer) - 1
    for path in tmp_path.iterdir():  # the second answer's state is not in the way
        assert path.stat().st_mode & 0o777 == 0o600
    with Process(pair, tmp_path) as process:
        text, cached = process.answer(second, method=method)
        assert cached[1] >= in_memory
        assert text == expected == plain(pair, second)
        assert process.disk.skipped == 0


def names(folder):
    return {path.name for path in folder.iterdir()}


@each_family
def test_a_grown_conversation_writes_only_what_is_new(pair, tmp_path):
    first = prompt_of(40)
    answer, _ = answered(pair, tmp_path, first)
    before = names(tmp_path)
    sizes = sum(path.stat().st_size for path in tmp_path.iterdir())
    with Process(pair, tmp_path) as process:
        process.answer([*first, *answer, *prompt_of(5, seed=1)])
    new = names(tmp_path) - before
    assert process.disk.written_bytes == sum((tmp_path / x).stat().st_size for x in new)
    # 17 positions more, and those that the drafter had not read.
    assert 2 <= len([x for x in new if "block" in x]) <= 4
    assert process.disk.written_bytes < sizes


@each_family
def test_what_the_drafter_has_not_read_is_written_once(pair, tmp_path):
    """An answer of one token needs no draft, so that the drafter reads nothing."""
    first = prompt_of(40)
    answered(pair, tmp_path, first, tokens=1)
    before = names(tmp_path)
    assert not [x for x in before if "block" in x]
    second = [*first, *prompt_of(9, seed=1)]
    with Process(pair, tmp_path) as process:
        assert process.answer(second, tokens=1)[1] == (0, 40)
    assert len([x for x in names(tmp_path) - before if "unread" in x]) == 1
    third = [*second, *prompt_of(9, seed=2)]
    expected = plain(pair, third)
    for _ in range(2):  # the drafter has read everything when the second begins
        with Process(pair, tmp_path) as process:
            text, (_, restored) = process.answer(third)
            assert text == expected
            assert restored >= 49
    assert [x for x in names(tmp_path) if "block" in x]


@each_family
def test_conversations_that_begin_alike_share_files(pair, tmp_path):
    beginning = prompt_of(32)
    answered(pair, tmp_path, [*beginning, *prompt_of(8, seed=1)], method="ar")
    blocks = {x for x in names(tmp_path) if "block" in x}
    with Process(pair, tmp_path) as process:
        text, cached = process.answer([*beginning, *prompt_of(8, seed=2)], method="ar")
        assert text == plain(pair, [*beginning, *prompt_of(8, seed=2)])
        # Recurrent layers have no state where the two part, unless it was a snapshot.
        assert cached == ((0, 0) if process.recurrent else (0, 32))
    later = {x for x in names(tmp_path) if "block" in x}
    assert len(later) - len(blocks) == len(blocks) - 4


@each_family
@pytest.mark.parametrize("other", ["salt", "pair", "method", "block"])
def test_other_keys_find_nothing(pair, tmp_path, other):
    prompt = prompt_of(40)
    answered(pair, tmp_path, prompt, salt="mine", method="ar")
    identity = b"another" if other == "pair" else b"pair"
    with Process(pair, tmp_path, identity=identity) as process:
        if other == "block":
            process.disk.block = 4
        salt = "theirs" if other == "salt" else "mine"
        text, cached = process.answer(prompt, salt, "treeflash" if other == "method" else "ar")
        assert cached == (0, 0)
        assert text == plain(pair, prompt)
        assert process.disk.skipped == 0


@each_family
def test_a_state_that_leaves_memory_comes_back(pair, tmp_path):
    prompts = [[seed + 1, *prompt_of(39, seed=seed)] for seed in range(3)]
    nbytes = 2 * pair.state_nbytes(64, drafts=True)
    with Process(pair, tmp_path, memory=nbytes) as process:
        texts = [process.answer(prompt)[0] for prompt in prompts]
        assert len(process.cache) < 3
        process.disk.save_all()
        text, cached = process.answer(prompts[0])
        assert cached[1] >= 32
        assert text == texts[0]


@each_family
def test_a_state_that_leaves_memory_before_it_was_copied_comes_back(pair, tmp_path):
    prompt = prompt_of(40)
    with Process(pair, tmp_path) as process:
        text, _ = process.answer(prompt)
        assert process.disk.has_unsaved
        process.cache.shrink(0)
        process.disk.save_all()
        again, (in_memory, restored) = process.answer(prompt)
        assert again == text
        assert restored >= 32 > in_memory


@pytest.mark.parametrize(("missing", "cached"), [(0, 1), (1, 0)])
def test_a_state_that_is_being_restored_counts_towards_the_memory(pair, tmp_path, missing, cached):
    """Others are decoded meanwhile, and their states are cached if there is room beside it."""
    prompt, finished = prompt_of(40), threading.Event()
    text, _ = answered(pair, tmp_path, prompt)
    with Process(pair, tmp_path) as process:
        scheduler, find = process.scheduler, process.disk.find
        process.disk.find = lambda *x, **y: find(*x, **y) if finished.wait(PATIENCE) else None
        config = DecodeConfig(method="treeflash", budget=8, max_tokens=12)
        long = Request(prompt_ids=prompt, config=config)
        short = Request(prompt_ids=[5, 6], config=replace(config, max_tokens=2))
        copied = pair.state_nbytes(2 + 2 - 1, drafts=True)
        states = sum(map(scheduler.state_bytes, (long, short)))
        scheduler.config = SchedulerConfig(max_bytes=states + copied - missing)
        scheduler.submit(short)
        scheduler.step()
        scheduler.submit(long)
        try:
            while scheduler.running:
                scheduler.step()
            assert (scheduler.waiting, len(process.cache)) == (1, cached)
        finally:
            finished.set()
        steps = [step for _, step in scheduler.run()]
    assert steps[0].disk_tokens >= 32
    assert [token for step in steps for token in step.tokens] == text


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (os, "open", OSError(errno.EMFILE, "Too many open files")),
        (state_files, "decode", MemoryError()),
    ],
)
def test_a_host_without_room_for_a_file_keeps_it(pair, tmp_path, caplog, owner, name, error):
    prompt = prompt_of(40)
    text, _ = answered(pair, tmp_path, prompt)
    before = names(tmp_path)
    with Process(pair, tmp_path) as process:
        process.disk.add = lambda *_: None
        with failing(owner, name, error):
            assert process.answer(prompt) == (text, (0, 0))
    assert names(tmp_path) == before
    assert not caplog.records
    with Process(pair, tmp_path) as process:
        assert process.answer(prompt)[1][1] >= 32


def test_the_limit_holds_and_the_least_recently_used_go_first(pair, tmp_path):
    prompts = [prompt_of(40, seed=seed) for seed in range(4)]
    answered(pair, tmp_path / "all", prompts[0])
    one = sum(path.stat().st_size for path in (tmp_path / "all").iterdir())
    limit = int(2.5 * one)
    for prompt in [*prompts[:2], prompts[0], prompts[2]]:
        with Process(pair, tmp_path / "some", nbytes=limit) as process:
            process.answer(prompt)
        assert sum(path.stat().st_size for path in (tmp_path / "some").iterdir()) <= limit
    restored = []
    for prompt in prompts:
        with Process(pair, tmp_path / "some", nbytes=limit) as process:
            process.disk.add = lambda *_: None
            restored.append(process.answer(prompt)[1][1])
    assert restored[0] >= 32
    assert restored[2] >= 32
    assert restored[1] < restored[0]
    assert restored[3] == 0


def test_two_processes_share_a_folder(pair, tmp_path):
    prompts = [prompt_of(40, seed=seed) for seed in range(2)]
    with Process(pair, tmp_path) as first, Process(pair, tmp_path) as second:
        texts = [first.answer(prompts[0])[0], second.answer(prompts[1])[0]]
        for process in (first, second):
            process.disk.save_all()
        for process, prompt, text in zip((second, first), prompts, texts, strict=True):
            again, (_, disk) = process.answer(prompt)
            assert again == text
            assert disk >= 32
        assert first.disk.skipped == second.disk.skipped == 0


def test_the_folder_is_not_listed_for_every_prompt(pair, tmp_path):
    """A folder of a big server has many files, on a disk that is perhaps on a network."""
    prompts = [prompt_of(40, seed=seed) for seed in range(3)]
    with Process(pair, tmp_path) as process:
        texts = [process.answer(prompt)[0] for prompt in prompts]
    with (
        recording(os, "scandir") as scanned,
        recording(os, "listdir") as listed,
        Process(pair, tmp_path, scan_s=3600.0) as process,
    ):
        for prompt, text in zip(prompts, texts, strict=True):
            again, (_, restored) = process.answer(prompt)
            assert again == text
            assert restored >= 32
        process.answer(prompt_of(40, seed=3))  # the state is written
    assert scanned + listed == [(tmp_path,)]


def test_a_process_finds_what_it_has_written_itself(pair, tmp_path):
    prompt = prompt_of(40)
    with Process(pair, tmp_path, scan_s=3600.0) as process:
        process.answer([1, *prompt])  # after it the folder is listed
        text, _ = process.answer(prompt)
        process.disk.save_all()
        process.cache.shrink(0)
        again, (_, restored) = process.answer(prompt)
        assert again == text
        assert restored >= 32


def test_a_file_that_another_process_removes_in_between_is_computed(pair, tmp_path):
    prompt = prompt_of(40)
    text, _ = answered(pair, tmp_path, prompt)
    with Process(pair, tmp_path) as process:
        read = process.disk.read
        process.disk.read = lambda kind, key: None if kind == "block" else read(kind, key)
        assert process.answer(prompt) == (text, (0, 0))


@each_family
def test_an_end_that_does_not_fit_its_blocks_is_computed(pair, tmp_path):
    """The drafter had not read the blocks that are left, as their successors suppose."""
    first = prompt_of(41)
    for tokens in (1, 6):
        answer, _ = answered(pair, tmp_path, first, tokens=tokens)
    for path in tmp_path.glob("*.block.*"):
        path.unlink()
    second = [*first, *answer, *prompt_of(3, seed=1)]
    with Process(pair, tmp_path) as process:
        text, cached = process.answer(second)
        assert cached == (0, 0 if process.recurrent else 40)
        assert process.disk.skipped == 0
    assert text == plain(pair, second)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_costs_speed_only(pair, tmp_path, caplog):
    prompt = prompt_of(40)
    tmp_path.chmod(0o500)
    text, _ = answered(pair, tmp_path, prompt)
    assert text == plain(pair, prompt)
    assert caplog.messages == [f"{tmp_path}: states cannot be written: Permission denied"]


@pytest.mark.parametrize(
    ("owner", "name", "error", "said"),
    [
        (state_files, "write", OSError(errno.ENOSPC, "No space left on device"), True),
        (State, "export", MemoryError("No space left on device"), False),  # for the host's copy
    ],
)
def test_a_full_disk_or_host_costs_speed_only(pair, tmp_path, caplog, owner, name, error, said):
    prompt = prompt_of(40)
    with failing(owner, name, error):
        text, _ = answered(pair, tmp_path, prompt)
    assert text == plain(pair, prompt)
    assert names(tmp_path) == set()
    line = f"{tmp_path}: states cannot be written: No space left on device"
    assert caplog.messages == [line] * said


def test_a_folder_that_cannot_be_made_costs_speed_only(pair, tmp_path, caplog):
    prompt, folder = prompt_of(40), tmp_path / "file" / "states"
    folder.parent.touch()
    with Process(pair, folder) as process:
        text, _ = process.answer(prompt)
        process.cache.shrink(0)
        assert process.answer(prompt) == (text, (0, 0))
    assert text == plain(pair, prompt)
    assert caplog.messages == [
        f"{folder}: states will not be stored: Not a directory",
        f"{folder}: states cannot be written: Not a directory",
    ]


def test_the_thread_that_decodes_waits_for_no_copy(pair, tmp_path, monkeypatch):
    """A device may still copy when the next iterations run; the writer waits."""
    prompt, decoded, waited = prompt_of(40), threading.Event(), []

    def wait():
        waited.append(threading.current_thread().name)
        assert decoded.wait(PATIENCE)

    monkeypatch.setattr(State, "copies_end", lambda state: wait)
    with Process(pair, tmp_path) as process:
        text, _ = process.answer(prompt)
        process.disk.copy_next()
        assert names(tmp_path) == set()
        decoded.set()
    assert set(waited) == {"treeflash-cache-writer"}
    with Process(pair, tmp_path) as process:
        again, (_, restored) = process.answer(prompt)
    assert again == text
    assert restored >= 32


def test_a_copy_that_fails_late_is_not_stored(pair, tmp_path, monkeypatch, caplog):
    def wait():
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with ...")

    monkeypatch.setattr(State, "copies_end", lambda state: wait)
    prompt = prompt_of(40)
    text, _ = answered(pair, tmp_path, prompt)
    assert text == plain(pair, prompt)
    assert names(tmp_path) == set()
    assert caplog.messages == [
        f"{tmp_path}: states cannot be written: CUDA error: an illegal memory access"
    ]


def test_short_states_are_not_stored(pair, tmp_path):
    answered(pair, tmp_path, [1, 2, 3], tokens=3)
    assert names(tmp_path) == set()


def test_a_cancelled_request_drops_its_restoration(pair, tmp_path):
    prompt = prompt_of(40)
    text, _ = answered(pair, tmp_path, prompt)
    with Process(pair, tmp_path) as process:
        config = DecodeConfig(method="treeflash", budget=8, max_tokens=12)
        request = process.scheduler.submit(Request(prompt_ids=prompt, config=config))
        process.scheduler.step()
        process.scheduler.cancel(request)
        assert not process.scheduler.busy
        assert process.answer(prompt)[0] == text


def test_what_a_killed_process_has_left_is_removed_and_strange_files_stay(pair, tmp_path):
    scratch = [tmp_path / f".{n:064x}.block.1a2b.tmp" for n in range(2)]
    strange = tmp_path / "notes.txt"
    for path in (*scratch, strange):
        path.write_text("something")
    scratch[1].write_text("")  # another process has just begun it
    for path in (scratch[0], strange):
        os.utime(path, (1, 1))
    with Process(pair, tmp_path, nbytes=1) as process:
        process.answer(prompt_of(40))
    assert strange.exists()
    answered(pair, tmp_path, prompt_of(40))
    assert [path.exists() for path in (*scratch, strange)] == [False, True, True]
