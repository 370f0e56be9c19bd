"""What CUDA does differently, on a machine without a GPU.

- `use_cuda_strides`: real values on the CPU, in the memory layout of CUDA's attention kernels.
- `FakeCuda`: tensors without values on `cuda` devices. Mixing devices or dtypes, reading a device
  tensor with NumPy, and copying between host and device while a graph is captured all raise.
"""

import math
import weakref
from collections import Counter
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from stand_ins import stand_in
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from treeflash_cuda import backend, drafter_loading, target_loading, visible_keys
from treeflash_cuda.decoder.weights import Checkpoint
from treeflash_cuda.drafter import OutputStage
from treeflash_cuda.gpu.host_copies import host_copies
from treeflash_cuda.hf import model_target
from treeflash_cuda.mtp_head import MtpHead
from treeflash_cuda.operations import Operations

from treeflash.decoding import backend_base

DEVICE, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
SCALARS = {getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "item", "is_nonzero")}
ALLOCATIONS = {
    getattr(torch.ops.aten, x) for x in ("empty", "empty_like", "new_empty", "lift_fresh")
}
SELECTIONS = {
    getattr(torch.ops.aten, name) for name in ("embedding", "gather", "index", "index_select")
}
WRITES = {getattr(torch.ops.aten, name) for name in ("index_copy_", "index_put_", "scatter_")}
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "linear")}


def kernel_output(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
    """The output of the kernel that CUDA chooses without cuDNN's: its shape, strides and dtype.

    Args:
        query: fake, or on the device `meta`, like the others.
        key: with fewer heads than the query, only the flash kernel takes it.
        value: as the key.
        attn_mask: the flash kernel takes none.
        is_causal: see `scaled_dot_product_attention`.
        scale: see `scaled_dot_product_attention`.

    Returns:
        None if no fused kernel can be chosen, so that plain products are.
    """
    _check_dtypes(query, key, value, attn_mask)
    aten = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal, scale=scale)[0]
    if query.shape[1] != key.shape[1]:
        return None
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, False, 0.0, is_causal, scale=scale)[0]


def use_cuda_strides(monkeypatch):
    """Return attention's values in the memory layout of CUDA's kernels."""
    plain = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **settings):
        out = plain(query, key, value, attn_mask=attn_mask, **settings)
        layout = kernel_output(*map(_meta, (query, key, value, attn_mask)), **settings)
        if layout is None:
            return out
        return torch.empty_strided(layout.shape, layout.stride(), dtype=out.dtype).copy_(out)

    stand_in(monkeypatch, F, scaled_dot_product_attention=attention)


def _meta(x):
    if x is None:
        return None
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@dataclass
class Transfers:
    """Copies between host and device."""

    uploads: int = 0
    reads: int = 0

    def add(self, to):
        """Count one to this type of device."""
        if to == "cpu":
            self.reads += 1
        else:
            self.uploads += 1


class FakeCuda(TorchDispatchMode):
    """A mode in which `cuda` devices exist, though their tensors hold no values.

    What is read on the host is made up: 0 for a scalar, ones for an array.

    Attributes:
        capturing: whether a graph is being captured.
        refusing: whether waiting for a device is refused.
        count: copies between host and device.
        launches: the names of the operations that launched a kernel on a device, in order.
        nbytes: what these operations read and wrote, if each of them reads and writes once.
        converted: elements of 8 bits on a device from which operations made floating-point numbers.
        free_bytes: memory of a device that other programs leave; tensors take of it.
        allocated, peak: bytes that tensors take and took at most, by device.
        capability: the devices' compute capability.
        waited: the devices whose events the host has waited for, in order.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.waited = []
        self.capturing = self.refusing = False
        self.count = Transfers()
        self.launches = []
        self.nbytes = 0
        self.columns = 0  # those that the rows of the latest pass see
        self.converted = 0
        self.free_bytes = 1 << 32
        self.allocated, self.peak = Counter(), Counter()
        self._storages = set()
        self.capability = 9, 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._patch_loading(monkeypatch)
        self._patch_tensors(monkeypatch)
        self._patch_graphs(monkeypatch)

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        host_copies.cache_clear()  # it has streams of this device
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in SCALARS:
            if args[0].device.type != "cpu":
                self._check_not_capturing(func)
                self.count.add("cpu")
            return 0
        if func.overloadpacket in PRODUCTS:
            _check_dtypes(*args)
        if _loops_on_the_host(func, args, self.capability):
            self._check_not_capturing(func)
            self.count.add("cpu")
        out = _computed(func, args, kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cuda":
                self._allocate(x.untyped_storage(), x.device)
        self.converted += _converted(args, out)
        if _launches(func, args, out):
            self._launch(str(func), _traffic(func, args, kwargs, out))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if _is_data(x)}
        if len(devices) > 1:
            self._check_not_capturing(func)
            self.count.add(out.device.type)
        return out

    @contextmanager
    def transfers(self):
        """Count the copies between host and device that are made inside."""
        self.count = Transfers()
        yield self.count

    def _launch(self, name, nbytes):
        self.launches.append(name)
        self.nbytes += nbytes

    def _allocate(self, storage, device):
        """Count the memory of a tensor until it is freed; it may be known."""
        key, nbytes = StorageWeakRef(storage), storage.nbytes()
        if key in self._storages:
            return
        if self.allocated[device] + nbytes > self.free_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
        self._storages.add(key)
        self.allocated[device] += nbytes
        self.peak[device] = max(self.peak[device], self.allocated[device])
        weakref.finalize(storage, self._free, key, device, nbytes).atexit = False

    def _free(self, key, device, nbytes):
        self._storages.remove(key)
        self.allocated[device] -= nbytes

    def _memory(self, device):
        return self.free_bytes - self.allocated[device], self.free_bytes

    def _reset_peak(self, device):
        self.peak[device] = self.allocated[device]

    def _check_not_capturing(self, func):
        if self.capturing or self.refusing:
            raise AssertionError(f"{func} moves data between host and device during a capture")

    def _patch_loading(self, monkeypatch):
        load_model, read_drafter = model_target.load_model, drafter_loading.read_drafter

        def load_fake_model(folder, config, dtype, device, *, processes, device_map, images):
            with unset_fake_temporarily():
                model = load_model(
                    folder, config, dtype, torch.device("cpu"), processes=processes, images=images
                )
            if device_map is None:
                return model.to(device)
            # As accelerate places it on two GPUs.
            decoder = model.get_decoder()
            for part in (decoder.embed_tokens, decoder.rotary_emb, *decoder.layers[:2]):
                part.to(device)
            for part in (*decoder.layers[2:], decoder.norm, model.get_output_embeddings()):
                part.to(SECOND)
            return model

        def read_fake_drafter(folder, owner):
            real = copy(owner)
            real.device = torch.device("cpu")
            with unset_fake_temporarily():
                model, head = read_drafter(folder, real)
            model = model.to(owner.device)
            if head is None:
                return model, None
            part = model if isinstance(head, MtpHead) else head.module.to(owner.device)
            return model, type(head)(part, OutputStage(model, owner))

        def read_real(checkpoint, name, shape):
            with unset_fake_temporarily():
                return read(checkpoint, name, shape)

        def plan_work(starts, sizes, shared, block):
            self.columns = int((shared + sizes).sum())
            return plain_plan(starts, sizes, shared, block)

        read, plain_plan = Checkpoint.read, visible_keys.plan_work
        stand_in(monkeypatch, Checkpoint, read=read_real)
        stand_in(monkeypatch, visible_keys, plan_work=plan_work)
        stand_in(monkeypatch, model_target, load_model=load_fake_model)
        stand_in(monkeypatch, drafter_loading, read_drafter=read_fake_drafter)
        for module in (backend, target_loading):
            stand_in(
                monkeypatch,
                module,
                choose_device=lambda name: DEVICE,
                load_operations=lambda shapes, *_: self._operations(shapes),
            )
        stand_in(monkeypatch, backend_base, check_trees=lambda backend: None)  # it compares values

    def _operations(self, shapes):
        """The operations of one kernel each that models of these shapes use."""

        def like(x, *shape, dtype=None):
            return torch.empty(shape or x.shape, dtype=dtype or x.dtype, device=x.device)

        def launch(name, nbytes, *tensors):
            assert len({x.device for x in tensors}) == 1
            self._launch(name, nbytes)

        def tree_attention(q, k, v, keys, **_):
            used = 2 * k.shape[0] * self.columns * k.shape[2] * k.element_size()
            nbytes = used + 2 * _nbytes(q) + _nbytes(keys.paths)
            launch("tree_attention", nbytes, q, k, v, keys.pages, keys.table, keys.paths)
            return like(q)

        def rms_norm(x, weight, eps, residual=None):
            launch("rms_norm", 2 * _nbytes(x), x, weight)
            return like(x), x

        def gated(gate, up, activation="silu"):
            launch("gated", 3 * _nbytes(up), gate, up)
            return like(up)

        def rotate_and_store(q, k, v, cos, sin, k_cache, v_cache, slots, **_):
            nbytes = 2 * sum(map(_nbytes, (q, k, v, cos)))
            launch("rotate_and_store", nbytes, q, k, v, cos, k_cache, slots)
            return like(q)

        def grouped_linear(x, weight, ends, bias=None):
            launch("grouped_linear", 2 * _nbytes(x) + _nbytes(weight), x, weight, ends)
            return like(x, len(x), weight.shape[1])

        def quantised_linear(x, weight, bias=None):
            assert weight.scales.dtype == x.dtype
            result = like(x, *x.shape[:-1], weight.numbers.shape[1])
            launch("quantised_linear", sum(map(_nbytes, (x, *weight, result))), x, *weight)
            return result

        def tree_recurrence(q, k, v, log_g, beta, states, slots, nodes, **_):
            nbytes = len(slots) * _nbytes(states[0]) + sum(map(_nbytes, (q, k, v, v)))
            launch("tree_recurrence", nbytes, q, k, v, log_g, states, slots, nodes.visits)
            trees, n, heads, value_dim = v.shape
            sizes = (value_dim, k.shape[3])
            written, keys = (like(v, trees, heads, n, x, dtype=torch.float32) for x in sizes)
            return like(v), written, keys

        def commit_recurrence(written, keys, log_g, states, paths):
            nbytes = 2 * len(paths) * _nbytes(states[0])
            launch("commit_recurrence", nbytes, written, keys, log_g, states, paths)

        def convolve_paths(rows, tails, slots, windows, weight, bias=None, activation=None):
            (trees, n, channels), width = rows.shape, tails.shape[2]
            out, inputs = like(rows), like(rows, trees, width + n, channels)
            nbytes = sum(map(_nbytes, (rows, out, inputs, weight)))
            launch("convolve_paths", nbytes, rows, tails, slots, windows, weight)
            return out, inputs

        def draft_noise(noise, tokens):
            read = [] if isinstance(tokens, int) else [tokens]
            width = read[0].shape[1] if read else tokens
            result = like(noise, len(noise), width, dtype=torch.float32)
            launch("draft_noise", sum(map(_nbytes, (noise, *read, result))), noise, *read)
            assert noise.device.type == "cuda"
            return result

        def noisy_log_probs(logits, noise, temperature, ids=None):
            result = like(logits, dtype=torch.float32)
            launch("log_prob_sums", _nbytes(logits), logits, noise)
            launch("noisy_log_probs", _nbytes(logits) + _nbytes(result), logits, noise)
            return result

        def move_columns(storage, sources, targets, ends):
            nbytes = 2 * len(sources) * _nbytes(storage[:, :, :, 0])
            launch("move_columns", nbytes, storage, sources, targets, ends)

        kernels = (tree_attention, rms_norm, gated, rotate_and_store, grouped_linear)
        kernels += (quantised_linear, tree_recurrence, commit_recurrence, convolve_paths)
        kernels += (draft_noise, noisy_log_probs, move_columns)
        return Operations(**{kernel.__name__: kernel for kernel in kernels}, shapes=shapes)

    def _patch_tensors(self, monkeypatch):
        numpy, plain_from_numpy = torch.Tensor.numpy, torch.from_numpy
        products = F.scaled_dot_product_attention

        def to_numpy(tensor):
            if not isinstance(tensor, FakeTensor):
                return numpy(tensor)
            self._check_not_capturing("numpy")
            if tensor.device.type != "cpu":
                raise TypeError(f"{tensor.device} tensors cannot be converted to NumPy")
            with unset_fake_temporarily():
                return np.ones(tensor.shape, numpy(torch.empty(0, dtype=tensor.dtype)).dtype)

        def from_numpy(array):
            with unset_fake_temporarily():
                real = plain_from_numpy(array)
            return torch.empty(real.shape, dtype=real.dtype)

        def attention(query, key, value, **settings):
            out = kernel_output(query, key, value, **settings)
            return products(query, key, value, **settings) if out is None else out

        def equal(one, other):
            fake = isinstance(one, FakeTensor) or isinstance(other, FakeTensor)
            return False if fake else plain_equal(one, other)

        plain_equal = torch.equal
        stand_in(monkeypatch, torch, equal=equal, from_numpy=from_numpy)
        stand_in(
            monkeypatch,
            torch.Tensor,
            numpy=to_numpy,
            pin_memory=lambda tensor: tensor,
            record_stream=lambda tensor, stream: None,
        )
        stand_in(monkeypatch, F, scaled_dot_product_attention=attention)

    def _patch_graphs(self, monkeypatch):
        @contextmanager
        def capture(graph, **_):
            self.capturing = True
            try:
                yield
            finally:
                self.capturing = False

        @contextmanager
        def nothing(*_):
            yield

        def refuse_waiting(mode):
            self.refusing = mode == "warn"

        stand_in(
            monkeypatch,
            torch.cuda,
            CUDAGraph=_Graph,
            Stream=partial(_Stream, self.waited),
            Event=lambda blocking: None,
            current_stream=partial(_Stream, self.waited),
            graph=capture,
            stream=nothing,
            device=nothing,
            get_sync_debug_mode=lambda: 0,
            set_sync_debug_mode=refuse_waiting,
            get_device_capability=lambda device: self.capability,
            get_device_name=lambda device: "fake",
            mem_get_info=self._memory,
            memory_allocated=self.allocated.__getitem__,
            max_memory_allocated=self.peak.__getitem__,
            graph_pool_handle=lambda: None,
            is_initialized=lambda: True,
            reset_peak_memory_stats=self._reset_peak,
        )
        # It asks the driver, in versions of PyTorch that have it.
        monkeypatch.setattr(varlen, "_cudnn_decode_disabled", lambda device: True, raising=False)


class _Graph:
    def pool(self):
        return None

    def replay(self):
        pass


class _Stream:
    def __init__(self, waited, device=None):
        self.waited, self.device = waited, device

    def wait_stream(self, stream):
        pass

    def record_event(self, event):
        return self

    def synchronize(self):
        self.waited.append(self.device)


def _computed(func, args, kwargs):
    """The result of an operation.

    Some versions of PyTorch know the shapes of grouped products in bfloat16 alone, though their
    kernels take other dtypes; and none knows the kernels of the GRU cell.
    """
    if func.overloadpacket is torch.ops.aten.gru_cell:
        return torch.empty_like(args[1])  # the state
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)
    if func.overloadpacket is not grouped or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    _check_dtypes(*args[:2])
    same = [x.bfloat16() if _is_floating(x) else x for x in args]
    return func(*same, **kwargs).to(args[0].dtype)


def _loops_on_the_host(func, args, capability):
    """Whether an operation is a grouped product for which PyTorch has no kernel.

    It then copies the groups' ends to the host (GroupedMMUtils.h of ATen).
    """
    if func.overloadpacket is not getattr(torch.ops.aten, "_grouped_mm", None):
        return False
    if args[0].device.type != "cuda":
        return False
    return args[0].dtype != torch.bfloat16 or capability not in ((9, 0), (10, 0))


def _converted(args, out):
    if not _is_floating(out) or out.device.type != "cuda":
        return 0
    numbers = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.int8]
    return sum(x.numel() for x in numbers if not _shares_memory(x, out))


def _shares_memory(x, y):
    return StorageWeakRef(x.untyped_storage()) == StorageWeakRef(y.untyped_storage())


def _is_floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _nbytes(x):
    """Bytes of a tensor's elements; those that `expand` repeats count once."""
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()


def _traffic(func, args, kwargs, out):
    """Bytes that an operation reads and writes; of tables only the rows that it selects."""
    results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if func.overloadpacket in SELECTIONS:
        inputs = [*inputs[1:], *results]
    elif func.overloadpacket in WRITES:
        inputs, results = inputs[1:], inputs[-1:]
    return sum(map(_nbytes, [*inputs, *results]))


def _launches(func, args, out):
    """Whether an operation computes something on a device: views and allocations do not."""
    if func.overloadpacket in ALLOCATIONS or "view" in func.__name__:
        return False
    tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    if any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns):
        # Conversions and reshapes are views where they can be.
        tensors = [x for x in tensors if not _shares_memory(x, args[0])]
    return any(x.device.type == "cuda" for x in tensors)


def _check_dtypes(*args):
    dtypes = {x.dtype for x in args if isinstance(x, torch.Tensor)}
    if len(dtypes) > 1:
        raise RuntimeError(f"expected the same dtype, got {dtypes}")


def _is_data(x):
    # Scalars on the CPU are passed by value.
    return isinstance(x, torch.Tensor) and (x.dim() > 0 or x.device.type != "cpu")
