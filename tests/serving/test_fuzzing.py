"""Requests made from the OpenAPI document, valid and not: never a status 500, never a hang."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import error_of, serving

from treeflash.testing.pairs import EXAMPLES

schemathesis = pytest.importorskip("schemathesis")

FEW = 60
"""Requests of each mode, valid and invalid, unless TREEFLASH_EXAMPLES asks for another number."""


def shorten(body):
    """Let a valid request ask for few tokens."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body, dict) and isinstance(body.get(name), int):
            body[name] = min(body[name], 3)
    if isinstance(body, dict) and isinstance(options := body.get("options"), dict):
        options["num_predict"] = 3


@pytest.fixture(scope="module")
def fuzzed(model):
    with serving(model, defaults={"max_tokens": 3}, max_choices=2) as running:
        yield running


@pytest.fixture(scope="module")
def document(fuzzed):
    return schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_operations(document, fuzzed, caplog, mode):
    operations = [document[path][x] for path, methods in document.items() for x in methods]
    if mode.is_negative:  # what has no body cannot be wrong
        operations = [x for x in operations if x.method.upper() == "POST"]

    @settings(
        max_examples=EXAMPLES or FEW,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of([x.as_strategy(generation_mode=mode) for x in operations]))
    def send(case):
        shorten(case.body)
        response = case.call()
        assert response.status_code in (200, 400, 404, 405, 413, 415), response.text
        if response.status_code != 200:
            assert mode.is_negative or case.method.upper() == "POST" or "{" in case.path
            error_of(case.path, response.json())

    with caplog.at_level(logging.WARNING):
        send()
    assert not [record for record in caplog.records if record.exc_info]
    assert fuzzed.chat(max_tokens=2).status_code == 200
    assert fuzzed.engine.unfinished == 0


SECONDS = int(os.environ.get("TREEFLASH_LOAD_SECONDS", "120"))
"""Seconds under load."""


# Minutes, with the default pair; `test_models.py` has clients that ask at once of small ones.
@pytest.mark.nightly
def test_the_default_pair_under_load():
    command = [sys.executable, "-m", "benchmarks.serving.load", "--seconds", str(SECONDS)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    report = json.loads(done.stdout)
    assert report["compared"] > SECONDS / 10
    assert report["different"] == 0
    assert report["requests"]["leave"] > 0
    assert report["requests"]["invalid"] > 0
    before, most = report["memory_mib"]
    assert most <= 1.1 * before
