"""The benchmark of the host's time: both ways to make trees decode the same texts."""

import json

import pytest

from treeflash.config import DecodeConfig
from treeflash.decoding import Request, Scheduler


@pytest.mark.parametrize("nodes", [4, 40])
def test_both_ways_make_the_same_trees(module, nodes):
    host, texts = module("decoding.host"), []
    for batched in (True, False):
        scheduler = Scheduler(host.Stub(batched=batched))
        config = DecodeConfig(method="treeflash", budget=nodes, suffix=False, max_tokens=60)
        requests = [Request(prompt_ids=[3, 4, n], config=config, tag=n) for n in range(5)]
        texts.append([(x.tag, step.tokens, step.path) for x, step in scheduler.decode(requests)])
    for one, other in zip(*texts, strict=True):
        assert one[:2] == other[:2]
        assert (one[2] is None) == (other[2] is None)
        assert one[2] is None or one[2].tolist() == other[2].tolist()


def test_the_command_prints_and_writes_both(module, tmp_path, capsys):
    host = module("decoding.host")
    path = tmp_path / "host.json"
    arguments = ["--sequences", "2", "--nodes", "4", "--iterations", "2", "--json", str(path)]
    assert host.main(arguments) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["sequences"], row["nodes"]) == (2, 4)
    assert row["host_ms"] > 0
    assert row["plain_ms"] > 0
    assert "plain ms" in capsys.readouterr().out
