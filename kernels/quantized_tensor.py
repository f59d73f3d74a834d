"""A parameter in few bits: for everybody else a tensor of its full shape and dtype, which is frozen.

Stock modules, adapters and device maps see `weight.shape`, `weight.dtype` and `weight[expert]` as always. What is
stored are the tensors of a `QuantizedStack`. An operation that can stay in few bits does (taking one expert, turning
the matrices, moving to a device); any other gets the numbers, made when they are needed and dropped afterwards.
Autograd keeps the few bits, and the numbers are made again for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .quantized_weights import NF4, PER_BYTE, QuantizedStack


_aten = torch.ops.aten


class QuantizedTensor(torch.Tensor):
    """A matrix (N, K) or a stack of matrices (E, N, K) in few bits; the last two axes swapped where `is_transposed`.

    Args:
        packed, scales, zeros, kind, group_size: as in `QuantizedStack`, without the axis E for one matrix.
        dtype: what the numbers are made in.
        is_transposed: whether the tensor is (..., K, N).
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    kind: str
    group_size: int | None
    is_transposed: bool

    @staticmethod
    def __new__(
        cls: type[QuantizedTensor],
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        kind: str,
        group_size: int | None,
        dtype: torch.dtype,
        is_transposed: bool = False,
    ) -> QuantizedTensor:
        *stack, rows, width = packed.shape
        length = width * PER_BYTE[kind]
        size = (*stack, length, rows) if is_transposed else (*stack, rows, length)
        # Not `requires_grad`: there is no gradient of codes.
        self: QuantizedTensor = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=packed.device)
        self.packed, self.scales, self.zeros = packed, scales, zeros
        self.kind, self.group_size, self.is_transposed = kind, group_size, is_transposed
        return self

    @classmethod
    def from_stack(cls, stack: QuantizedStack, *, dims: int = 3, is_transposed: bool = False) -> QuantizedTensor:
        """The tensor that `stack` stands for; `dims` is 2 for a stack of one matrix that is to be a matrix."""
        packed, scales, zeros = stack.packed, stack.scales, stack.zeros
        if dims == 2:
            packed, scales, zeros = packed[0], scales[0], None if zeros is None else zeros[0]
        return cls(packed, scales, zeros, stack.kind, stack.group_size, stack.dtype, is_transposed)

    def stack(self, dtype: torch.dtype | None = None) -> QuantizedStack:
        """The numbers as kernels take them: (E, N, K), and (1, N, K) for a matrix.

        Args:
            dtype: what the kernels make the numbers in; that of this tensor where it is not given.
        """
        packed, scales, zeros = (
            part[None] if part is not None and self.dim() == 2 else part
            for part in (self.packed, self.scales, self.zeros)
        )
        assert packed is not None and scales is not None
        experts, rows, width = packed.shape
        shape = (experts, rows, width * PER_BYTE[self.kind])
        kind: Any = self.kind
        return QuantizedStack(kind, packed, scales, zeros, shape, self.group_size, dtype or self.dtype)

    def dequantize(self) -> torch.Tensor:
        """A plain tensor of the same shape and dtype."""
        if torch.compiler.is_compiling() or type(self.packed) is not torch.Tensor:
            numbers = _dequantize_in_graph(self)
        else:
            numbers = self.stack().dequantize()
            numbers = numbers[0] if self.dim() == 2 else numbers
        return numbers.transpose(-1, -2) if self.is_transposed else numbers

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that are stored: `packed`, `scales` and, where there are any, `zeros`."""
        found = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros}
        return {name: part for name, part in found.items() if part is not None}

    def element_size(self) -> Any:
        """Bytes of a number on average, so that sums over parameters are what is stored."""
        return sum(part.nbytes for part in self.parts().values()) / max(self.numel(), 1)

    def with_parts(self, function: Callable[[torch.Tensor], torch.Tensor], **changes: Any) -> QuantizedTensor:
        """The same form with `function` applied to all that is stored, and other `dtype` or `is_transposed`."""
        zeros = None if self.zeros is None else function(self.zeros)
        form = {"dtype": self.dtype, "is_transposed": self.is_transposed, **changes}
        return QuantizedTensor(function(self.packed), function(self.scales), zeros, self.kind, self.group_size, **form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"QuantizedTensor({self.kind}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        twin: Any = self.with_parts(torch.clone)
        if isinstance(self, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, requires_grad=False)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        form = (self.kind, self.group_size, self.dtype, self.is_transposed)
        return _rebuild, (self.packed, self.scales, self.zeros, *form, isinstance(self, torch.nn.Parameter))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.parts()), (self.kind, self.group_size, self.dtype, self.is_transposed)

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, torch.Tensor], form: Any, *_: Any) -> QuantizedTensor:
        return cls(parts["packed"], parts["scales"], parts.get("zeros"), *form)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], QuantizedTensor):
            out = handler(func, *args, **kwargs)
            if out is not NotImplemented:
                return out
        written = [place for place, argument in enumerate(func._schema.arguments) if _is_written(argument)]
        if any(isinstance(args[place], QuantizedTensor) for place in written if place < len(args)):
            raise RuntimeError(
                f"these weights are quantized ({next(iter(_quantized(args))).kind}) and cannot be changed in place "
                f"(by `{func}`). To merge an adapter or to train them, call `model.dequantize()` first."
            )

        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, QuantizedTensor) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _quantized(args: Any) -> list[QuantizedTensor]:
    return [value for value in args if isinstance(value, QuantizedTensor)]


def _rebuild(packed: Any, scales: Any, zeros: Any, *form_and_role: Any) -> Any:
    *form, is_parameter = form_and_role
    tensor = QuantizedTensor(packed, scales, zeros, *form)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _same(func: Any, x: QuantizedTensor, **kwargs: Any) -> QuantizedTensor:
    """`detach` and `alias`: another tensor of the same numbers."""
    return x.with_parts(lambda part: part)


def _clone(func: Any, x: QuantizedTensor, **kwargs: Any) -> QuantizedTensor:
    return x.with_parts(torch.clone)


def _to_copy(func: Any, x: QuantizedTensor, **kwargs: Any) -> Any:
    """The numbers stay as they are: a dtype is what they are made in."""
    dtype = kwargs.pop("dtype", None) or x.dtype
    if not dtype.is_floating_point or kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    device, blocking = kwargs.get("device"), not kwargs.get("non_blocking", False)
    return x.with_parts(lambda part: part.to(device, copy=True, non_blocking=not blocking), dtype=dtype)


def _transpose(func: Any, x: QuantizedTensor, first: int = 0, second: int = 1) -> Any:
    if {first % x.dim(), second % x.dim()} != {x.dim() - 1, x.dim() - 2}:
        return NotImplemented
    return x.with_parts(lambda part: part, is_transposed=not x.is_transposed)


def _select(func: Any, x: QuantizedTensor, dim: int, index: int) -> Any:
    if dim % x.dim() != 0 or x.dim() != 3:
        return NotImplemented
    return x.with_parts(lambda part: part[index])


def _unbind(func: Any, x: QuantizedTensor, dim: int = 0) -> Any:
    return NotImplemented if dim % x.dim() or x.dim() != 3 else [_select(func, x, 0, e) for e in range(len(x))]


def _copy_(func: Any, x: QuantizedTensor, source: Any, *args: Any) -> Any:
    """From weights of the same form, as loading a state dict does it."""
    same = isinstance(source, QuantizedTensor) and (x.shape, x.kind, x.group_size, x.is_transposed) == (
        source.shape,
        source.kind,
        source.group_size,
        source.is_transposed,
    )
    if not same or x.parts().keys() != source.parts().keys():
        return NotImplemented
    for mine, theirs in zip(x.parts().values(), source.parts().values(), strict=True):
        mine.copy_(theirs)
    return x


_HANDLERS: dict[Any, Any] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.t.default: _transpose,
    _aten.transpose.int: _transpose,
    _aten.select.int: _select,
    _aten.unbind.int: _unbind,
    _aten.copy_.default: _copy_,
}


def _dequantize_in_graph(x: QuantizedTensor) -> torch.Tensor:
    """(..., N, K), as plain operations that a compiler can trace."""
    per_byte = PER_BYTE[x.kind]
    if x.kind == "int8":
        values = x.packed.float()
    else:
        bits = 8 // per_byte
        shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
        codes = ((x.packed[..., None] >> shifts) & (1 << bits) - 1).flatten(-2)
        if x.kind == "nf4":
            values = torch.tensor(NF4, device=x.device)[codes.long()]
        else:
            values = codes.float() - (0 if x.zeros is not None else 8 if x.kind == "int4" else 1)
    if x.group_size is None:
        return (values * x.scales.float()).to(x.dtype)
    grouped = values.unflatten(-1, (-1, x.group_size))
    if x.zeros is not None:
        grouped = grouped - x.zeros[..., None]
    return (grouped * x.scales.float()[..., None]).flatten(-2).to(x.dtype)
