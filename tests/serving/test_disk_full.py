"""A full disk: what the server writes is its log and, before it starts, the models it fetches."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
from failures import failing
from processes import core_command
from servers import PATIENCE, wait_until, wait_until_ready

from treeflash.commands import serve as command

FULL = Path("/dev/full")


def test_while_models_are_fetched(capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
    with failing(command.cli, "locate_model", full):
        code = command.main(["--port", "0"])
    err = capsys.readouterr().err
    assert code == 2
    assert err == "error: model.safetensors: No space left on device\n"


# A server in a process. What it writes there is Python's `logging`, which survives any error.
@pytest.mark.nightly
@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_the_server_answers_though_its_log_cannot_be_written(model, tmp_path):
    args = ["--backend", "reference", "--target", model.folder, "--method", "ar", "--port", 0]
    environment = {**os.environ, "TREEFLASH_CACHE": str(tmp_path)}
    with (
        FULL.open("w") as log,
        subprocess.Popen(
            core_command("serve", *map(str, args)),
            stderr=log,
            env=environment,
        ) as process,
    ):

        def listening():
            assert process.poll() is None, "the server has ended"
            connections = psutil.Process(process.pid).net_connections("tcp4")
            return [x.laddr.port for x in connections if x.status == psutil.CONN_LISTEN]

        try:
            wait_until(listening)
            url = f"http://127.0.0.1:{listening()[0]}"
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                wait_until_ready(client)
                body = {"prompt": "A", "max_tokens": 4, "ignore_eos": True}
                answer = client.post("/v1/completions", json=body)
            assert answer.json()["usage"]["completion_tokens"] == 4
            process.send_signal(signal.SIGTERM)
            # Python ends with 120 if some of its log was left to flush.
            assert process.wait(PATIENCE) in (0, 120)
        finally:
            process.kill()
