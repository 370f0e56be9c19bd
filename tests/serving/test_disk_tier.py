"""The disk tier's settings, in the server and in the conversation of a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from treeflash.commands.chat import ChatSession
from treeflash.errors import ConfigError
from treeflash.serving.engine import Engine
from treeflash.serving.settings import GIB, Settings


@pytest.mark.usefixtures("own_cache")
def test_a_conversation_in_the_terminal_goes_on(model, tmp_path):
    answers = []
    for restored in (False, True):
        disk = model.disk_cache(tmp_path, GIB)
        console = Console(file=io.StringIO())
        talked = ChatSession(model, {"max_tokens": 8, "seed": 1}, console, disk=disk)
        talked.reply("A long question. " * 20)
        talked.close()
        first = talked.answer.chunks[0].step
        assert (first.disk_tokens >= 256) == restored
        answers.append(talked.messages[-1]["content"])
    assert answers[0] == answers[1]


def start(model, **settings):
    engine = Engine(lambda: model, Settings(**settings))
    engine.start()
    engine.stop()


def test_a_folder_needs_a_prefix_cache(model, tmp_path):
    with pytest.raises(ConfigError, match="raise prefix_cache_gb"):
        start(model, prefix_cache_dir=str(tmp_path), prefix_cache_gb=0)


@pytest.mark.usefixtures("own_cache")
def test_a_file_is_no_folder(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="file is a file; give a folder"):
        start(model, prefix_cache_dir=str(file))


@pytest.mark.parametrize("folder", ["", 7])
def test_what_is_no_path_is_no_folder(folder):
    with pytest.raises(ConfigError, match=f"must be the path of a folder, got {folder!r}"):
        Settings(prefix_cache_dir=folder)


def test_no_room_is_no_limit():
    with pytest.raises(ConfigError, match="prefix_cache_disk_gb must be above 0, got 0"):
        Settings(prefix_cache_disk_gb=0)
