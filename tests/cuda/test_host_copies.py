"""Copies of states to the host, beside what a GPU computes."""

from contextlib import contextmanager

import numpy as np
import pytest
from fake_cuda import DEVICE

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")

import torch
from treeflash_cuda.backend import load
from treeflash_cuda.gpu.host_copies import HostCopies


class LateDevice:
    """A device that copies on a stream of its own, only when somebody waits for its events.

    Attributes:
        queue: what the stream has still to do.
        kept: tensors that the stream reads, for which memory is kept.
    """

    def __init__(self, monkeypatch):
        self.queue, self.kept, inside = [], [], []
        plain_empty, plain_copy = torch.empty, torch.Tensor.copy_

        @contextmanager
        def on_stream(stream):
            inside.append(stream)
            yield
            inside.pop()

        def copy(target, source, non_blocking=False):
            if not inside:
                return plain_copy(target, source)
            assert non_blocking, "the host would wait"
            self.queue.append(lambda: plain_copy(target, source))
            return target

        def empty(*shape, pin_memory=False, **settings):
            return plain_empty(*shape, **settings).fill_(-1)

        for place, name, stand_in in (
            (torch.cuda, "Stream", lambda device: self),
            (torch.cuda, "Event", lambda blocking: self),
            (torch.cuda, "current_stream", lambda device: None),
            (torch.cuda, "stream", on_stream),
            (torch.Tensor, "copy_", copy),
            (torch.Tensor, "record_stream", lambda tensor, stream: self.kept.append(tensor)),
            (torch, "empty", empty),
        ):
            monkeypatch.setattr(place, name, stand_in)

    def wait_stream(self, stream):
        """The stream begins when the current one is done, which is at once."""

    def record_event(self, event):
        return event

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()


def test_a_copy_has_what_the_tensor_showed_when_it_began(monkeypatch):
    device, copies = LateDevice(monkeypatch), HostCopies()
    storage = torch.arange(24.0).view(4, 6)
    expected = storage[:, 1:4].numpy().copy()
    copied = copies.begin(storage[:, 1:4])
    wait = copies.end()
    storage.zero_()  # another sequence has the columns
    assert len(device.queue) == len(device.kept) == 1
    np.testing.assert_array_equal(copied.numpy(), -np.ones((4, 3)))
    wait()
    np.testing.assert_array_equal(copied.numpy(), expected)


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_nothing_waits_for_a_state_that_is_exported(cuda, family, tmp_path):
    backend = load(*write_pair(tmp_path, family), LoadConfig(dtype="bfloat16"))
    state = backend.open(40, drafts=True)
    backend.verifier.run([Prefill(state, [3, 4, 5, 6], None)])
    with cuda.transfers() as count:
        export = state.export(0, 4, end=True)
    assert count.reads == len(export.begun)
    assert cuda.waited == []
    assert {x.dtype for x in export.begun.values()} <= {np.dtype(np.uint16), np.dtype(np.float32)}
    assert export.arrays() is export.begun
    assert cuda.waited == [DEVICE]
