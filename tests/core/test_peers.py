"""The comparison with llama.cpp, whose library is replaced by a script."""

import json
import shutil

import pytest

from benchmarks.peers import system
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.system import SYSTEMS, Peer, PeerError, command

LLAMA = next(one for one in SYSTEMS if one.name == "llama.cpp")
# Continues a prompt by its length, 2, 3, 4, ...; with a predictor every second token is a draft.
LIBRARY = """
export const LlamaLogLevel = {error: "error"};
export class InputLookupTokenPredictor { updateInputTokens(tokens) { this.input = tokens; } }
class Sequence {
    constructor(options) { this.tokenPredictor = options?.tokenPredictor; this.used = 7; }
    get tokenPredictions() { return {used: this.used}; }
    async clearHistory() { this.cleared = true; }
    async *evaluate(prompt, options) {
        if (options.temperature || !this.cleared) throw new Error("not plain decoding");
        this.cleared = false;
        for (let token = prompt.length; ; token++) {
            if (this.tokenPredictor && token % 2) this.used++;
            yield token;
        }
    }
}
const model = {
    typeDescription: "tiny Q4_1",
    createContext: async () => ({getSequence: (options) => new Sequence(options)}),
};
export const getLlama = async () => ({
    llamaCppRelease: {release: "b1"},
    loadModel: async ({modelPath}) => {
        if (modelPath === "bad.gguf") throw new Error("no model in bad.gguf");
        return model;
    },
});
"""
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder in which llama.cpp's library is installed; it is the script."""
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    monkeypatch.setattr(system.platform, "system", lambda: "Linux")
    monkeypatch.setattr(system.platform, "machine", lambda: "x86_64")
    folder = tmp_path / "peers" / "llama.cpp"
    package = folder / "node_modules" / "node-llama-cpp"
    (package / "dist").mkdir(parents=True)
    (package / "dist" / "index.js").write_text(LIBRARY)
    (package / "package.json").write_text(json.dumps({"version": "3.22.1", "type": "module"}))
    lines = "node-llama-cpp@3.22.1\n@node-llama-cpp/linux-x64@3.22.1"
    (folder / "installed.txt").write_text(lines)
    return folder


@pytest.fixture
def start(installed):
    """Start llama.cpp's worker with the script as its library, and end it afterwards."""
    peers = []

    def start(**setup):
        usual = {"gguf": "target.gguf", "stop_token_ids": [9], "dtype": "auto"}
        peers.append(Peer(LLAMA, usual | setup, 1))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


@needs_node
def test_llama_cpp_decodes_plainly_and_with_drafts(start):
    peer = start()
    methods = ["generate", "input-lookup"]
    assert peer.description["methods"] == methods
    assert peer.description["dtype"] == "tiny Q4_1"
    assert peer.description["versions"] == {"node-llama-cpp": "3.22.1", "llama.cpp": "b1"}
    for prompt in ([5, 5], [5, 5, 5]):
        for method in methods:
            request = {"prompts": [prompt], "method": method, "budget": None, "max_tokens": 4}
            found = peer.ask(request)
            first = len(prompt)
            assert found["token_ids"] == [[*range(first, first + 4)]]
            assert found["forwards"] == (3 if method == "generate" else 1)
            assert found["seconds"] > found["first"][0] > 0
            assert found["processor_seconds"] > 0
    stopped = peer.ask({"prompts": [[5] * 8], "method": "generate", "max_tokens": 4})
    assert stopped["token_ids"] == [[8, 9]]


@needs_node
def test_its_own_plain_decoding_is_the_baseline(start):
    comparison = Comparison()
    comparison.add(start(), ["auto"])
    comparison.run([[5, 5, 5]], 4)  # warms up
    comparison.run([[5, 5]], 4, keep={"set": "a", "group": 0})
    rows = [row for row in comparison.rows() if row["set"] == "a"]
    assert [row["method"] for row in rows] == ["generate", "input-lookup"]
    assert rows[0]["ratio_to_generate"] == rows[0]["ratio_to_llama_cpp"] == 1
    assert all(row["equal"] == row["prompts"] == 1 for row in rows)
    assert comparison.skipped == []


@needs_node
def test_a_target_that_llama_cpp_cannot_load_is_a_reason(start):
    with pytest.raises(PeerError, match=r"no model in bad\.gguf"):
        start(gguf="bad.gguf")


def test_nothing_is_installed_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PeerError, match="needs the target as a GGUF file: --gguf FILE"):
        Peer(LLAMA, {"gguf": None, "device": "cpu"}, 1)


def test_a_machine_without_node_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PeerError, match=r"needs Node\.js"):
        command(LLAMA, tmp_path)


def test_an_installed_version_is_not_installed_again(installed, monkeypatch):
    monkeypatch.setattr(system.shutil, "which", lambda name: name)
    assert command(LLAMA, installed.parent) == ["node", str(LLAMA.worker), str(installed)]


def test_systems_of_any_framework_are_compared_with_llama_cpp():
    record = {"budget": None, "dtype": "x", "set": "a", "group": 0, "forwards": 3, "threads": 2}
    record |= {"token_ids": [[1, 2, 3, 4, 5, 6, 7]], "first": [1.0], "processor_seconds": 2.0}
    record |= {"concurrency": 1}
    plain = record | {"system": "llama.cpp", "backend": "gguf", "method": "generate"}
    ours = record | {"system": "treeflash", "backend": "cuda", "method": "treeflash"}
    comparison = Comparison()
    comparison.records = [plain | {"seconds": 3.0}, ours | {"seconds": 1.5}]
    # Cases with other numbers of threads are compared among themselves.
    comparison.records += [x | {"threads": 1, "seconds": 4.0} for x in (plain, ours)]
    rows = [x for x in comparison.rows() if x["set"] == "a" and x["backend"] == "cuda"]
    assert [(x["threads"], x["ratio_to_llama_cpp"]) for x in rows] == [(2, 4), (1, 1)]
    assert all(x["ratio_to_generate"] is None for x in rows)
    assert all(x["tokens_per_processor_s"] == 3 for x in rows)


def test_groups_count_all_their_tokens_and_time_and_are_compared_with_single_prompts():
    case = {"budget": None, "dtype": "x", "threads": 2, "system": "treeflash", "backend": "cuda"}
    case |= {"forwards": 9, "processor_seconds": 2.0, "set": "a"}
    comparison = Comparison(whole=True)
    for method, speed in (("ar", 1), ("treeflash", 3)):
        for group, texts in (
            (0, [[1, 2]]),
            (1, [[3, 4]]),
            (0, [[1, 2], [3, 9 - 5 * (speed == 1)]]),
        ):
            record = case | {"method": method, "group": group, "concurrency": len(texts)}
            seconds = (1 + len(texts)) / speed
            record |= {"token_ids": texts, "first": [0.1] * len(texts), "seconds": seconds}
            comparison.records.append(record)
    rows = {(x["method"], x["concurrency"]): x for x in comparison.rows() if x["set"] == "a"}
    speeds = {
        key: (x["tokens_per_s"], x["ratio_to_ar"], x["ratio_to_one"]) for key, x in rows.items()
    }
    assert speeds == {
        **{("ar", 1): (1, 1, 1), ("ar", 2): (4 / 3, 1, 4 / 3)},
        **{("treeflash", 1): (3, 3, 1), ("treeflash", 2): (4, 3, 4 / 3)},
    }
    # Without another package, texts are compared with plain decoding.
    assert [x["equal"] for x in rows.values()] == [2, 2, 2, 1]
    assert [x["block_efficiency"] is None for x in rows.values()] == [False, True, False, True]
