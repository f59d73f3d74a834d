"""Matrix products on a CPU, by whichever library is fastest here.

Intel, AMD and Arm differ, and so do three rows and three hundred: the same product can be twice as fast through
another call. So the calls are timed, once per process for each data type, size of matrix and power of two of rows, on
the first operands that come. `HF_MOE_EXT_CPU_MATMUL=rows` (or `columns`, `mkldnn`) skips that, for runs that have to
be equal bit for bit.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable

import torch


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_SETTING = "HF_MOE_EXT_CPU_MATMUL"


def _rows(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.t(), out=buffer.view(x.shape[0], weight.shape[0]))


def _columns(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    return torch.mm(weight, x.t(), out=buffer.view(weight.shape[0], x.shape[0])).t()


def _mkldnn(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def _vector(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    return torch.mv(weight, x[0], out=buffer).view(1, -1)


PRODUCTS: dict[str, Product] = {"rows": _rows, "columns": _columns, "mkldnn": _mkldnn, "vector": _vector}
_chosen: dict[tuple, Product] = {}
_lock = threading.RLock()  # a timed call may choose a product itself


def candidates(dtype: torch.dtype, rows: int) -> dict[str, Product]:
    """The calls that this build of PyTorch has for a data type and a number of rows."""
    has_mkldnn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if dtype == torch.bfloat16:
        has_mkldnn = has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    has_mkldnn = has_mkldnn and dtype in (torch.float32, torch.bfloat16)
    names = ["rows"] + (["mkldnn"] if has_mkldnn else []) + (["vector"] if rows == 1 else ["columns"])
    return {name: PRODUCTS[name] for name in names}


def is_pinned() -> bool:
    """Whether nothing may be chosen by the clock."""
    return _SETTING in os.environ


def product(
    x: torch.Tensor, stack: torch.Tensor, number: int, buffer: torch.Tensor, row_major: bool = False
) -> torch.Tensor:
    """`x @ stack[number].T` without gradients: (n, K), (E, N, K) -> (n, N).

    Args:
        x: (n, K), any strides.
        stack: (E, N, K), any strides.
        number: which matrix.
        buffer: (n * N,), contiguous; the result may lie in it, by rows or by columns, or be a tensor of its own.
        row_major: put the result into the buffer by rows, and choose the call with that in mind.
    """
    # Strides decide which calls are quick, so they belong to the key; powers of two keep the timings few.
    key = (x.dtype, stack.shape[1:], x.shape[0].bit_length(), stack.stride(2) == 1, x.stride(1) == 1, row_major)
    call = _chosen.get(key)
    if call is None:
        call = _choose(key, x, stack, number, buffer, row_major)
    return _run(call, x, stack[number], buffer, row_major)


def _run(call: Product, x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor, row_major: bool) -> torch.Tensor:
    if not row_major or call is _rows or call is _vector:
        return call(x, weight, buffer)
    out = buffer.view(x.shape[0], weight.shape[0])
    if call is _columns:
        return out.copy_(torch.mm(weight, x.t()).t())
    return out.copy_(call(x, weight, buffer))


def _choose(
    key: tuple, x: torch.Tensor, stack: torch.Tensor, number: int, buffer: torch.Tensor, row_major: bool
) -> Product:
    known = candidates(x.dtype, x.shape[0])
    setting = os.environ.get(_SETTING)
    if setting is not None:
        if setting not in PRODUCTS:
            raise ValueError(f"`{_SETTING}` must be one of {', '.join(PRODUCTS)}, got {setting!r}.")
        _chosen[key] = known.get(setting, _rows)
        return _chosen[key]

    def timed(name: str, turn: int) -> None:
        # Each time another matrix: in a model they come from memory, not from the caches.
        _run(known[name], x, stack[(number + turn) % stack.shape[0]], buffer, row_major)

    _chosen[key] = known[fastest(list(known), timed)]
    return _chosen[key]


def fastest(names: list[str], call: Callable[[str, int], object], repeats: int = 5) -> str:
    """The name whose call takes the least time: each is called once to warm up, then all of them in turns.

    Args:
        names: what to choose from.
        call: gets a name, and a number that is another one each time.
        repeats: timed calls of each.
    """
    turns = itertools.count()
    with _lock:
        best = dict.fromkeys(names, float("inf"))
        for name in names:
            call(name, next(turns))
        for _ in range(repeats):
            for name in names:
                started = time.perf_counter()
                call(name, next(turns))
                best[name] = min(best[name], time.perf_counter() - started)
    return min(best, key=lambda name: best[name])
