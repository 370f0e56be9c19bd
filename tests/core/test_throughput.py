"""The throughput of many texts: groups, rows, systems that fail, and a run of the tiny pair."""

from __future__ import annotations

import json

import pytest

from treeflash.config import METHODS

PROMPTS = ["The sea is", "Why", "A list of cities:", "One and one is"]


@pytest.fixture
def sets(tmp_path):
    """Two files of four prompts."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        lines = [json.dumps({"id": n, "turns": [text]}) for n, text in enumerate(PROMPTS)]
        file.write_text("\n".join(lines))
    return [str(file) for file in files]


@pytest.fixture
def options(sets, tiny_pair):
    """Arguments of a short run."""
    target, drafter = map(str, tiny_pair)
    pair = ["--target", target, "--drafter", drafter, "--backend", "reference"]
    return [*sets, *pair, "--limit", "2", "--max-tokens", "4", "--concurrency", "1,2"]


def test_a_run_writes_rows_of_every_method(module, options, tmp_path):
    file = tmp_path / "out.json"
    main = module("throughput.__main__").main
    assert main([*options, "--long-prompt", "40", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["benchmark"] == "throughput"
    assert {"date", "cpu", "versions"} <= found["machine"].keys()
    rows = found["rows"]
    assert [(r["set"], r["concurrency"], r["method"]) for r in rows] == [
        *((name, n, method) for n in (1, 2) for name in "ab" for method in METHODS),
        *(("mean", n, method) for n in (1, 2) for method in METHODS),
    ]
    assert all(row["system"] == "treeflash" for row in rows)
    assert all(row["prompts"] == row["equal"] == 2 for row in rows if row["set"] != "mean")
    assert all(row["prompts"] == row["equal"] == 4 for row in rows if row["set"] == "mean")
    assert all(0 < row["first_token_s"] <= row["first_token_p95_s"] for row in rows)
    assert all(row["ratio_to_padded"] is None for row in rows)
    assert {row["ratio_to_ar"] for row in rows if row["method"] == "ar"} == {1.0}
    assert {row["ratio_to_one"] for row in rows if row["concurrency"] == 1} == {1.0}
    assert found["skipped"] == []
    cached = found["prefix"]
    assert (cached["prompt_tokens"], cached["cached_tokens"]) == (40, 38)
    assert cached["cached_to_whole"] == cached["cached_first_token_s"] / cached["first_token_s"]


def answers(module, *texts):
    answer = module("throughput.systems").Answer
    return [answer(token_ids=tokens, first_s=first, last_s=last) for tokens, first, last in texts]


def record(module, set_name, concurrency, system, method, *texts, group=0):
    return module("throughput.figures").Record(
        set_name=set_name,
        concurrency=concurrency,
        system=system,
        method=method,
        group=group,
        answers=answers(module, *texts),
    )


def test_rows(module):
    text = (5, 6, 7, 8)
    found = module("throughput.figures").rows(
        [
            record(module, "a", 1, "treeflash", "ar", (text, 0.1, 2.0)),
            record(module, "a", 1, "treeflash", "ar", (text, 0.3, 2.0), group=1),
            record(module, "a", 2, "treeflash", "ar", (text, 0.2, 1.0), (text, 0.4, 2.0)),
            record(module, "a", 2, "transformers", "generate", (text, 1, 4.0), ((5, 6), 1, 2.0)),
            record(module, "b", 2, "treeflash", "ar", (text, 0.2, 1.0), (text, 0.4, 1.0)),
            record(module, "b", 2, "transformers", "generate", (text, 3, 4.0), (text, 3, 8.0)),
        ]
    )
    by_case = {(r["set"], r["concurrency"], r["method"]): r for r in found}
    assert by_case["a", 1, "ar"]["tokens_per_s"] == 2
    assert by_case["a", 1, "ar"]["first_token_s"] == pytest.approx(0.2)
    assert by_case["a", 1, "ar"]["first_token_p95_s"] == pytest.approx(0.29)
    ours, padded = by_case["a", 2, "ar"], by_case["a", 2, "generate"]
    assert (ours["tokens_per_s"], padded["tokens_per_s"]) == (4, 1.5)
    assert (ours["ratio_to_one"], padded["ratio_to_one"]) == (2, None)
    assert ours["ratio_to_padded"] == pytest.approx(4 / 1.5)
    assert padded["ratio_to_ar"] == 1.5 / 4
    assert (ours["equal"], padded["equal"]) == (2, 1)
    mean = by_case["mean", 2, "ar"]
    assert (mean["tokens_per_s"], mean["prompts"], mean["equal"]) == (6, 4, 4)
    assert mean["ratio_to_padded"] == pytest.approx((4 / 1.5 + 8) / 2)
    assert mean["ratio_to_one"] is None  # the set b has none
    assert by_case["mean", 2, "generate"]["first_token_s"] == 2


def test_groups_are_full(module):
    groups = module("throughput.__main__").groups
    prompts = [[n] for n in range(6)]
    assert groups(prompts, 3, 1, "a") == [[[0]], [[1]], [[2]]]
    assert groups(prompts, 3, 2, "a") == [[[0], [1]], [[2], [3]]]
    assert groups(prompts, 3, 6, "a") == [prompts]
    with pytest.raises(ValueError, match="a has 6 prompts and 8 are needed for groups of 4"):
        groups(prompts, 5, 4, "a")


def test_a_peer_that_fails_is_dropped_with_its_records(module):
    throughput = module("throughput.__main__")
    calls = []

    def run(prompts, max_tokens):
        calls.append(len(prompts))
        return answers(module, *(((5,), 0.1, 0.2) for _ in prompts))

    def fails(prompts, max_tokens):
        if len(prompts) > 1:
            raise RuntimeError("no\nroom")
        return run(prompts, max_tokens)

    systems = {("treeflash", "ar"): run, ("mlx-lm", "batch_generate"): fails}
    args = throughput.parser().parse_args(["a", "--limit", "2", "--concurrency", "1,2"])
    records, skipped = throughput.measure(systems, {"a": [[1], [2]]}, args)
    assert skipped == [
        {"system": "mlx-lm", "method": "batch_generate", "reason": "RuntimeError: no room"}
    ]
    assert [(x.system, x.set_name, x.concurrency, x.group) for x in records] == [
        ("treeflash", "a", 1, 0),
        ("treeflash", "a", 1, 1),
        ("treeflash", "a", 2, 0),
    ]


def test_our_own_failure_ends_the_run(module):
    throughput = module("throughput.__main__")

    def fails(prompts, max_tokens):
        raise RuntimeError("broken")

    args = throughput.parser().parse_args(["a", "--limit", "1", "--concurrency", "1"])
    with pytest.raises(RuntimeError, match="broken"):
        throughput.measure({("treeflash", "ar"): fails}, {"a": [[1]]}, args)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--systems", "vllm"], "--systems has no 'vllm'; choose from treeflash, transformers"),
        (["--methods", "medusa"], "--methods has no 'medusa'; choose from ar, dflash"),
        (["--concurrency", "0,1"], "--concurrency: every number must be 1 or more"),
        (["--concurrency", "1,8"], "a has 4 prompts and 8 are needed for groups of 8"),
    ],
)
def test_bad_options(module, options, capsys, extra, message):
    assert module("throughput.__main__").main([*options, *extra]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_plot_is_an_image(module, tmp_path):
    pytest.importorskip("matplotlib")
    figures = module("throughput.figures")
    texts = ((5, 6), 0.1, 0.2)
    records = [
        record(module, "a", n, "treeflash", method, *[texts] * n)
        for n in (1, 2)
        for method in ("ar", "treeflash")
    ]
    figures.draw(figures.rows(records), "caption", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
