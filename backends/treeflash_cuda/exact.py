"""Exact arithmetic: what is computed for a position depends on the tokens up to it alone.

The problem. Floating-point sums depend on their order: (0.1 + 0.2) + 0.3 and 0.1 + (0.2 + 0.3)
differ in the last bit. A library chooses the order by the shape of its inputs, so a token that is
computed beside fifteen others is usually rounded differently from the same token alone. Where two
tokens are nearly equally probable, the other one then wins, and the text is another.

The idea. Give each sum an order that depends on positions, never on what shares the pass. Terms
that a token must not see stay in the sum as exact zeros, which change no bit wherever they stand.

An example, with groups of 4 positions instead of `SUM_SIZE`. Five tokens are committed, at the
positions 0 to 4, and the root `a` has the children `b` and `c`, `b` the child `d`:

    column     0 1 2 3 | 4 5 6 7 | 8         `d` sees every column but c's. Its sum of values is
    position   0 1 2 3 | 4 5 6 6 | 7
    token      . . . .   . a b c   d             ((v0 + v1 + v2 + v3) + (v4 + va + vb + 0 + vd))

All these columns are of the groups 0 to 3 and 4 to 7: `d` is at position 7, although its column is
8. Plain decoding, which has `a`, `b`, `d` at the columns 5, 6, 7 and never drafts `c`, computes
((v0 + v1 + v2 + v3) + (v4 + va + vb + vd)): the same terms in the same order. That holds for every
node, because ancestors come before it, in the order of their positions.

The rule, on a CPU:

- A linear layer never runs with a single row where oneDNN has another kernel for it: a pass of one
  token has equal rows of it (`token_rows`), and other products are padded. FBGEMM, which
  multiplies float16, has the same kernel for one row with AVX-512; with AVX2 alone it has the same
  kernels for multiples of three rows. Products of more rows than have the same bits are split: on
  Intel's processors with AMX those have at most 32 (`bound_products`).
- Attention sums over groups of `SUM_SIZE` positions, which begin at multiples of it, one group
  after the other, in float32 (`exact_attention`). Within a group the kernel of a batched product
  adds one key after the other in the order of the columns, up to `MAX_KEYS` of them. With AVX2
  alone, MKL does so on Intel's processors in its strict mode (`MKL_CBWR`).
- Scores are sums over the head's width, and the largest score does not depend on an order. The
  denominator is summed like the numerator: a column of ones is stored beside the values.
- Activations whose result depends on a number's place read contiguous numbers, as PyTorch's GELU
  does (`pack_activations`).

Everything else computes each row separately. On a GPU the Triton kernels keep the rule, with one
more kernel for products (`gpu.exact_products`). The underlying libraries guarantee none of
this, so `bound_products`, `check_products`, `check_activations`, `check_attention` and
`treeflash.decoding.probe.check_exact` test it on each machine at load.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.probe import INEXACT
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.linear import PackedLinear, PlainLinear, is_subclass, uses_fbgemm
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear

HAS_AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether the processor has AVX2 and no AVX-512."""
if HAS_AVX2_ALONE and "Intel" in torch.cpu.get_capabilities()["cpu_name"]:
    # MKL's AVX2 kernels for Intel's processors sum in another order at the edges of a product, and
    # where threads divide it, unless MKL finds this variable at its first product. For AMD's they
    # do not, but in the strict mode they do.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
LINEARS = nn.Linear, PackedLinear, PlainLinear
LINEAR_ROWS = 2
"""Least rows of a product: oneDNN has another kernel for a single one."""
STREAMED_ROWS = 4
"""Rows of a lone token where weights are read from memory: oneDNN reads them faster for 3 or 4 rows
than for 1 or 2. Weights in a cache are read as fast for 2 rows, and 2 rows are less work."""
FBGEMM_ROWS = 3
"""With AVX2 alone FBGEMM computes three rows or more at once; one or two have other bits."""
CHECKED_MULTIPLICATIONS = 1 << 33
"""Most multiplications of a checked product of more rows than `CHECKED_ROWS`: checks of large
weights would take seconds."""
CANCELLED_WEIGHTS = 1 << 24
"""Most weights of a product that is checked with terms that cancel: results of more weights are so
many that some show another order."""
CACHE_NBYTES = 64 << 20
"""Weights of more bytes than this are read from memory, not from a cache."""


def token_rows(model: nn.Module, dtype: torch.dtype) -> int:
    """Return how many equal rows give a lone token the bits of more rows in the least time.

    Weights of few bits need one; products with other weights are then padded.
    """
    if any(isinstance(x, LowBitLinear) for x in model.modules()):
        return 1
    if uses_fbgemm(dtype):
        return row_multiple(dtype)
    weights = sum(x.numel() * x.itemsize for x in model.parameters())
    return STREAMED_ROWS if weights > CACHE_NBYTES else LINEAR_ROWS


def row_multiple(dtype: torch.dtype) -> int:
    """Return the number of whose multiples products of a dtype must have rows on this machine."""
    return FBGEMM_ROWS if HAS_AVX2_ALONE and uses_fbgemm(dtype) else 1


def bound_products(
    model: nn.Module,
    dtype: torch.dtype,
    undo: ExitStack,
    passed: PassedChecks,
    multiplications: int = CHECKED_MULTIPLICATIONS,
) -> int:
    """Let the linear layers of a loaded model give a row equal bits, whatever rows are beside it.

    Until `undo` ends, products of fewer than `LINEAR_ROWS` rows are padded, others to a multiple of
    `row_multiple`, and products of more rows than get equal bits on this machine are split. Shapes
    that were checked before have their number of rows in `passed`. Passes of one token have more
    rows anyway: the output head of a longer pass is padded.

    Returns the most rows that no product splits. Raises an UnsupportedModelError if fewer than
    `LEAST_ROWS` rows have the same bits, or a module computes products in another way.
    """
    most: dict[tuple[tuple[int, int], str], int] = {}  # most rows by shape, and dtype or format
    for owner, name, shape in products_of(model):
        product = getattr(owner, name)
        # Few bits: rows are independent by construction, and are compared nevertheless.
        is_low = isinstance(owner, LowBitLinear)
        sizes = (1, 1) if is_low else (LINEAR_ROWS, row_multiple(dtype))
        bounded, kind = _BoundedProduct(product, *sizes), owner.name if is_low else str(dtype)
        if (shape, kind) not in most:
            affordable = multiplications // math.prod(shape)
            counts = [n for n in MORE_CHECKED_ROWS if n <= affordable]
            counts = [*CHECKED_ROWS, *counts]
            device = next(model.parameters()).device
            check = partial(_equal_rows, bounded, shape, dtype, device, counts, LEAST_ROWS)
            if not is_low and math.prod(shape) <= CANCELLED_WEIGHTS:
                check = partial(_most_equal_rows, check, owner, shape, dtype, sizes)
            most[shape, kind] = passed.find(f"products of {shape} in {kind}", check)
        bounded.most = most[shape, kind]
        undo.callback(setattr, owner, name, product)
        setattr(owner, name, bounded)
    return min(most.values())


def _most_equal_rows(
    check: Callable[[], int],
    layer: nn.Module,
    shape: tuple[int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int],
) -> int:
    """Return the most rows up to which both a layer and one whose terms cancel have equal bits.

    The order of a sum changes its last bits in float32, which a result in half precision seldom
    shows. Where the sum of the terms is zero, nothing but these bits is left. `sizes` are for
    `_BoundedProduct`.
    """
    most = check()
    counts = [n for n in (*CHECKED_ROWS, *MORE_CHECKED_ROWS) if n <= most]
    random, half = torch.Generator().manual_seed(0), shape[1] // 2
    order = torch.randperm(half, generator=random)
    weight = torch.randn(shape[0], half, generator=random).to(dtype)
    rows = torch.randn(1, counts[-1], half, generator=random).to(dtype)
    odd = shape[1] % 2
    weight = F.pad(torch.cat([weight, -weight[:, order]], 1), (0, odd))
    rows = F.pad(torch.cat([rows, rows[..., order]], -1), (0, odd))
    if isinstance(layer, PackedLinear):
        product: Callable[[Tensor], Tensor] = PackedLinear(weight, None)
    else:
        weights = {"weight": weight}
        if layer.bias is not None:
            weights["bias"] = torch.zeros(shape[0], dtype=dtype)
        product = partial(functional_call, layer, weights)
    return _equal_results(_BoundedProduct(product, *sizes), rows, counts, LEAST_ROWS)


def products_of(model: nn.Module) -> Iterator[tuple[Any, str, tuple[int, int]]]:
    """Yield the objects that compute a model's products, the names of their functions, and shapes.

    The shapes are (out, in). Raises an UnsupportedModelError if a module computes products in
    another way.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            if not isinstance(module, LowBitEmbedding):
                yield module, "forward", module.shape
        elif isinstance(module, LINEARS) and not is_subclass(module.weight):
            out, width = module.weight.shape
            yield module, "forward", (out, width)
        elif not isinstance(module, nn.Embedding) and any(
            x.ndim > 1 for x in module.parameters(recurse=False)
        ):
            raise UnsupportedModelError(
                f"{INEXACT}: it does not support the products of {type(module).__name__} ({name})"
            )


class _BoundedProduct:
    """A product of at least `least` rows, a multiple that zeros fill up, split at `most` rows."""

    def __init__(self, product: Callable[[Tensor], Tensor], least: int, multiple: int) -> None:
        self.product = product
        self.least = least
        self.multiple = multiple
        self.most = MORE_CHECKED_ROWS[-1]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[-2]
        if rows > self.most:
            return torch.cat([self(part) for part in x.split(self.most, -2)], -2)
        missing = max(self.least - rows, -rows % self.multiple)
        if missing <= 0 or not rows:
            return self.product(x)
        return self.product(F.pad(x, (0, 0, 0, missing)))[..., :rows, :]


def activations(model: nn.Module) -> Iterator[nn.Module]:
    modules = "transformers.activations", "torch.nn.modules.activation"
    return (x for x in model.modules() if type(x).__module__ in modules)


def pack_activations(model: nn.Module, dtype: torch.dtype, undo: ExitStack) -> None:
    """Let the activations of a loaded model read contiguous numbers until `undo` ends.

    Only activations that depend on places do; in half precision all numbers are tried.
    """
    for module in activations(model):
        if dtype.itemsize > 2 or _depends_on_place(module, dtype):
            hook = module.register_forward_pre_hook(
                lambda _, x: tuple(part.contiguous() for part in x)
            )
            undo.callback(hook.remove)


def check_activations(model: nn.Module, dtype: torch.dtype) -> None:
    """Compare activations of all 65,536 numbers bit for bit, in rows of other lengths and strides.

    Raises an UnsupportedModelError if an activation depends on a number's place.
    """
    for module in {type(x): x for x in activations(model)}.values():
        if _depends_on_place(module, dtype):
            raise UnsupportedModelError(
                f"{INEXACT}: {type(module).__name__} depends on a number's place on this machine"
            )


def check_gates(gated: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype) -> None:
    """Compare the gates of rows alone and beside others bit for bit; see `decoder.operations`.

    Raises an UnsupportedModelError if a row depends on the number of rows.
    """
    random = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(CHECKED_ROWS[-1], 2 * size, generator=random).to(dtype)
    expected = gated(x)
    if any(not torch.equal(gated(x[:rows]), expected[:rows]) for rows in CHECKED_ROWS):
        raise UnsupportedModelError(
            f"{INEXACT}: the activation of a row depends on the number of rows on this machine"
        )


def _depends_on_place(module: nn.Module, dtype: torch.dtype) -> bool:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers.view(dtype) if dtype.itemsize == 2 else numbers.to(dtype)
    numbers = numbers[numbers.isfinite()]
    expected = module(numbers)
    strided = module(torch.stack([numbers, numbers], 1)[:, 0])
    shifted = [module(numbers[place:].clone()) for place in (1, 3, 7)]
    return any(not torch.equal(x, expected[-len(x) :]) for x in (strided, *shifted))


CHECKED_ROWS = (*range(1, 18), 24, 31, 32, 33, 48, 63, 64)
MORE_CHECKED_ROWS = (96, 128, 255, 256, 512)
"""Rows of prompts and of batches."""
LEAST_ROWS = 16
"""A target is refused if a product of this many rows has to be split: it would be slow."""


def check_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Compare products of 1 to 64 random rows bit for bit, for each shape of a linear layer.

    Raises an UnsupportedModelError if a product's rows depend on the number of rows.
    """
    device = next(model.parameters()).device
    products = {shape: getattr(owner, name) for owner, name, shape in products_of(model)}
    for shape, product in products.items():
        _equal_rows(product, shape, dtype, device, CHECKED_ROWS, CHECKED_ROWS[-1])


def _equal_rows(
    product: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    counts: Sequence[int],
    least: int,
) -> int:
    """Return the largest of some ascending numbers of rows up to which rows have the same bits.

    Raises an UnsupportedModelError if it is smaller than `least`.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, counts[-1], shape[1], generator=random).to(device, dtype)
    return _equal_results(product, x, counts, least)


def _equal_results(
    product: Callable[[Tensor], Tensor], x: Tensor, counts: Sequence[int], least: int
) -> int:
    """Return the largest of `counts` up to which the first rows of (1, n, width) have equal bits.

    Raises what `_equal_rows` does.
    """
    previous = product(x[:, : counts[0]])
    for rows in counts[1:]:
        result, equal = product(x[:, :rows]), previous.shape[1]
        if not torch.equal(result[:, :equal], previous):
            if equal < least:
                raise UnsupportedModelError(
                    f"{INEXACT}: {x.dtype} products of {x.shape[2]} x {result.shape[2]} weights "
                    "depend on the number of rows on this machine "
                    f"({equal} rows differ from {rows})"
                )
            return equal
        previous = result
    return counts[-1]
