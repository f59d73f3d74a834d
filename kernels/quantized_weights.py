"""Weights of experts in 8, 4 and 2 bits: how the numbers are rounded and packed.

A stack (E, N, K) is quantised along K, the axis that a product sums over. The number at a place is
`scale * (code - offset)`, or `scale * NF4[code]`:

| kind | code | scales | offset |
| --- | --- | --- | --- |
| int8 | -127..127, one a byte | one for each row | 0 |
| int4 | 0..15, two a byte | one for each group of a row | 8, or a zero point for each group |
| nf4 | 0..15, two a byte: a place in a table | one for each group of a row | |
| ternary | 0..2, four a byte | one for each row, or for each expert | 1 |

The table is that of QLoRA (https://arxiv.org/abs/2305.14314).

Of the codes that share a byte the first along K has the lowest bits. Axes: E experts, N rows of the result, K length
of the contraction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from . import cpu_experts
from .expert_weights import Activation, ExpertWeights


Kind = Literal["int8", "int4", "nf4", "ternary"]

PER_BYTE: dict[str, int] = {"int8": 1, "int4": 2, "nf4": 2, "ternary": 4}
GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Appendix E of QLoRA.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class QuantizedStack:
    """A stack of matrices (E, N, K) in few bits; see the table above.

    Args:
        kind: "int8", "int4", "nf4" or "ternary".
        packed: (E, N, K / numbers in a byte), int8 for "int8", else uint8.
        scales: (E, N, groups of a row); (E, 1, 1) for one an expert. float32, float16 or bfloat16.
        zeros: zero points of "int4", uint8 of the shape of `scales`; `None` for 8 everywhere.
        shape: E, N, K.
        group_size: 32, 64 or 128 numbers along K; `None` for whole rows.
        dtype: of the stack that was quantised, and of what `dequantize` gives.

    Raises:
        ValueError: a kind or size that there is not, or tensors that do not fit.
    """

    kind: Kind
    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    shape: tuple[int, int, int]
    group_size: int | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        _check_form(self.kind, self.shape, self.group_size, self.zeros is not None, self.dtype)
        experts, rows, length = self.shape
        per_group = (experts, rows, self.num_groups)
        allowed: list[tuple[int, ...]] = [per_group, (experts, 1, 1)] if self.kind == "ternary" else [per_group]
        width, number = length // PER_BYTE[self.kind], torch.int8 if self.kind == "int8" else torch.uint8
        _check_tensor("packed", self.packed, [(experts, rows, width)], (number,))
        _check_tensor("scales", self.scales, allowed, DTYPES)
        if self.zeros is not None:
            _check_tensor("zeros", self.zeros, [per_group], (torch.uint8,))

    @property
    def num_groups(self) -> int:
        """Groups of a row: 1 where the scale is that of the whole row."""
        return 1 if self.group_size is None else self.shape[2] // self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.to_tensors().values())

    @property
    def description(self) -> dict[str, Any]:
        """All but the tensors, as JSON has it."""
        return {
            "format": _FORMAT,
            "kind": self.kind,
            "shape": list(self.shape),
            "group_size": self.group_size,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`packed`, `scales` and, where there are any, `zeros`: contiguous, as safetensors wants them."""
        found = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> QuantizedStack:
        """What `description` and `to_tensors` were made of, bit for bit.

        Raises:
            ValueError: a newer format, missing or unknown entries, or tensors that do not fit.
        """
        wanted = {"format", "kind", "shape", "group_size", "dtype"}
        if set(description) != wanted:
            raise ValueError(f"the description must have {sorted(wanted)}, got {sorted(description)}.")
        if description["format"] != _FORMAT:
            raise ValueError(f"`format` must be {_FORMAT}, got {description['format']!r}.")
        if not {"packed", "scales"} <= set(tensors) <= {"packed", "scales", "zeros"}:
            raise ValueError(f"the tensors must be packed, scales and perhaps zeros, got {sorted(tensors)}.")
        dtype = getattr(torch, str(description["dtype"]), None)
        return cls(
            description["kind"],
            tensors["packed"],
            tensors["scales"],
            tensors.get("zeros"),
            tuple(description["shape"]),
            description["group_size"],
            dtype,
        )

    def to(self, device: torch.device | str) -> QuantizedStack:
        """The same stack on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, packed=self.packed.to(device), scales=self.scales.to(device), zeros=zeros)

    def dequantize(self, numbers: Sequence[int] | None = None) -> torch.Tensor:
        """(E, N, K), or (n, N, K) of the n experts in `numbers`; computed in float32 and rounded to `dtype`.

        Raises:
            IndexError: a number that is no expert's.
        """
        chosen = range(self.shape[0]) if numbers is None else numbers
        out = torch.empty(len(chosen), *self.shape[1:], dtype=self.dtype, device=self.packed.device)
        for matrix, number in zip(out, chosen, strict=True):
            self.dequantize_into(number, matrix)
        return out

    @torch.no_grad()
    def dequantize_into(self, number: int, out: torch.Tensor) -> torch.Tensor:
        """Write one expert into `out` (N, K), contiguous and of `dtype`; returns it."""
        experts, rows, length = self.shape
        if not 0 <= number < experts:
            raise IndexError(f"there are experts 0 to {experts - 1}, got {number}.")
        device, packed = self.packed.device, self.packed[number]
        exact = out if out.dtype == torch.float32 else kept_buffer("dequantized", rows * length, torch.float32, device)
        exact = exact.view(rows, length)
        if self.kind == "int8":
            exact.copy_(packed)
        else:  # a byte is a place in a table of all that it can hold
            table = _table(self.kind, self.zeros is not None, device)
            places = kept_buffer("bytes", packed.numel(), torch.int32, device).copy_(packed.reshape(-1))
            torch.index_select(table, 0, places, out=exact.view(-1, table.shape[1]))
        values = exact.view(rows, self.num_groups, -1)
        if self.zeros is not None:
            values.sub_(self.zeros[number, :, :, None])
        values.mul_(self.scales[number, :, :, None].float())
        return exact if exact.data_ptr() == out.data_ptr() else out.copy_(exact)


def _check_form(kind: Any, shape: Any, group_size: Any, has_zeros: bool, dtype: Any) -> None:
    if kind not in PER_BYTE:
        raise ValueError(f"`kind` must be one of {', '.join(PER_BYTE)}, got {kind!r}.")
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"a stack must be (E, N, K), none of them 0, got {tuple(shape)}.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {DTYPES}, got {dtype}.")
    grouped = kind in ("int4", "nf4")
    if grouped and group_size not in GROUP_SIZES:
        raise ValueError(f"`group_size` of {kind} must be one of {GROUP_SIZES}, got {group_size}.")
    if not grouped and group_size is not None:
        raise ValueError(f"{kind} has no groups within a row, `group_size` must be None, got {group_size}.")
    step = group_size if grouped else PER_BYTE[kind]
    if shape[2] % step:
        raise ValueError(f"for {kind} the last axis must be a multiple of {step}, got {shape[2]}.")
    if has_zeros and kind != "int4":
        raise ValueError(f"zero points are for int4, got {kind}.")


def _check_tensor(name: str, tensor: torch.Tensor, shapes: list[tuple[int, ...]], dtypes: Sequence[Any]) -> None:
    if tuple(tensor.shape) not in shapes or tensor.dtype not in dtypes:
        raise ValueError(
            f"`{name}` must be of shape {' or '.join(map(str, shapes))} and {' or '.join(map(str, dtypes))}, "
            f"got {tuple(tensor.shape)} and {tensor.dtype}."
        )


def kept_buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(size,) elements to work in; on a CPU of memory that stays, see `cpu_experts.workspace`."""
    if device.type == "cpu":
        return cpu_experts.workspace(f"quantized_{name}", size, dtype)
    return torch.empty(size, dtype=dtype, device=device)


@functools.lru_cache
def _table(kind: Kind, has_zeros: bool, device: torch.device) -> torch.Tensor:
    """(256, numbers in a byte): the numbers of each byte, before zero points and scales."""
    bits = 8 // PER_BYTE[kind]
    codes = torch.arange(256)[:, None] >> bits * torch.arange(PER_BYTE[kind]) & (1 << bits) - 1
    with torch.inference_mode(False):  # kept, so usable in and out of inference mode
        if kind == "nf4":
            return torch.tensor(NF4)[codes].to(device)
        return (codes - (0 if has_zeros else 8 if kind == "int4" else 1)).float().to(device)


def pack(codes: torch.Tensor, per_byte: int) -> torch.Tensor:
    """(..., K) uint8, each below `2 ** (8 / per_byte)`, -> (..., K / per_byte): the first code in the lowest bits."""
    parts = codes.unflatten(-1, (-1, per_byte))
    out = parts[..., 0].clone()
    for place in range(1, per_byte):
        out |= parts[..., place] << place * (8 // per_byte)
    return out


@torch.no_grad()
def quantize(
    stack: torch.Tensor,
    kind: Kind,
    *,
    group_size: int | None = None,
    zero_points: bool = False,
    scale_of_expert: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedStack:
    """Round a stack to few bits, each number to the nearest one that its scale allows.

    Scales of "int8", "int4" and "nf4" are as small as they can be without cutting the largest number. Then no error is
    above half a step (the scale) of the integers, or half the gap of the table times the scale. Ternary scales are
    those of the least squared error, so what is ternary already stays as it is.

    Args:
        stack: (E, N, K), float32, float16 or bfloat16.
        kind: "int8", "int4", "nf4" or "ternary".
        group_size: numbers along K with one scale, 32, 64 or 128, for int4 and nf4; 64 where it is not given.
        zero_points: int4 from the least to the largest number of a group (and 0), else as far down as up.
        scale_of_expert: one scale for each expert, for ternary; else one a row.
        scale_dtype: float32, float16 or bfloat16; bfloat16 for groups and float32 for rows where it is not given.

    Raises:
        ValueError: an unknown kind or an option that it does not have, K no multiple of the group (or of the numbers
            in a byte), numbers that are NaN or infinite, or so large that `scale_dtype` cannot hold the scale.
    """
    if kind in ("int4", "nf4") and group_size is None:
        group_size = 64
    _check_form(kind, stack.shape, group_size, zero_points, stack.dtype)
    if scale_of_expert and kind != "ternary":
        raise ValueError(f"one scale for each expert is for ternary, got {kind}.")
    if scale_dtype is None:
        scale_dtype = torch.float32 if group_size is None else torch.bfloat16
    if scale_dtype not in DTYPES:
        raise ValueError(f"`scale_dtype` must be one of {DTYPES}, got {scale_dtype}.")
    experts, rows, length = stack.shape
    groups = 1 if group_size is None else length // group_size
    number = torch.int8 if kind == "int8" else torch.uint8
    packed = torch.empty(experts, rows, length // PER_BYTE[kind], dtype=number, device=stack.device)
    shape = (experts, 1, 1) if scale_of_expert else (experts, rows, groups)
    scales = torch.empty(shape, dtype=scale_dtype, device=stack.device)
    zeros = torch.empty(shape, dtype=torch.uint8, device=stack.device) if zero_points else None
    for e in range(experts):  # one at a time: float64 copies of all would be large
        if not stack[e].isfinite().all():
            raise ValueError(f"the weights of expert {e} are not all finite.")
        values = stack[e].double().reshape(rows, groups, -1)
        if kind == "ternary":
            flat = values.reshape(1, 1, -1) if scale_of_expert else values
            scales[e] = _least_squares_scale(flat).to(scale_dtype)
            codes = (values / _divisor(scales[e])).round().clamp(-1, 1) + 1
        elif zeros is not None:
            low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
            scales[e] = _round_up((high - low) / 15, scale_dtype)
            zero = (-low[..., None] / _divisor(scales[e])).round()
            zeros[e] = zero[..., 0].to(torch.uint8)
            codes = ((values / _divisor(scales[e])).round() + zero).clamp(0, 15)
        else:
            largest = {"int8": 127, "int4": 7, "nf4": 1}[kind]
            scales[e] = _round_up(values.abs().amax(-1) / largest, scale_dtype)
            codes = values / _divisor(scales[e])
            codes = _nearest_nf4(codes) if kind == "nf4" else codes.round() + (8 if kind == "int4" else 0)
        codes = codes.to(number).view(rows, length)
        packed[e] = codes if kind == "int8" else pack(codes, PER_BYTE[kind])
        if not scales[e].isfinite().all():
            raise ValueError(f"the weights of expert {e} are too large for scales in {scale_dtype}.")
    return QuantizedStack(kind, packed, scales, zeros, (experts, rows, length), group_size, stack.dtype)


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """(N, G) -> (N, G, 1) float64; 1 for groups of zeros, whose scale is 0."""
    exact = scales.double()[..., None]
    return torch.where(exact == 0, 1.0, exact)


def _round_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64, none negative, to the next number of `dtype` that is not smaller.

    Of the bits of float32 the last 8 stay 0: then a scale times a code is exact in float32, and numbers that were
    quantised before get the same scale again.
    """
    number, step = (torch.int32, 256) if dtype == torch.float32 else (torch.int16, 1)
    bits = values.to(dtype).view(number) // step * step
    # Positive floating-point numbers are in the order of their bits.
    return torch.where(bits.view(dtype).double() < values, bits + step, bits).view(dtype)


def _nearest_nf4(values: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(NF4, dtype=torch.float64, device=values.device)
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2)


def _least_squares_scale(values: torch.Tensor) -> torch.Tensor:
    """(..., K) -> (...): the s for which the nearest of -s, 0 and s has the least squared error.

    If the n largest become -s or s, their mean is the best s, and the error falls by the square of their sum over n.
    """
    sums = values.abs().sort(dim=-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, values.shape[-1] + 1, dtype=sums.dtype, device=sums.device)
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    return (sums.gather(-1, best) / (best + 1))[..., 0]


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """What `ExpertWeights` says, with stacks in few bits. Whatever the layout of the module, K is their last axis.

    Args:
        up: (E, 2I, H), or (E, I, H) without a gate; H is the hidden size, I the intermediate size.
        down: (E, H, I).
        up_bias, down_bias, has_gate, is_concatenated, activation, apply: as in `ExpertWeights`;
            biases are not quantised.

    Raises:
        ValueError: shapes or dtypes of the stacks that do not fit together.
    """

    up: QuantizedStack
    down: QuantizedStack
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    has_gate: bool
    is_concatenated: bool
    activation: Activation | None
    apply: Callable[[torch.Tensor], torch.Tensor]

    def __post_init__(self) -> None:
        experts, hidden, intermediate = self.down.shape
        wanted = (experts, (2 if self.has_gate else 1) * intermediate, hidden)
        if self.up.shape != wanted or self.up.dtype != self.down.dtype:
            raise ValueError(
                f"`up` must be {wanted} in {self.down.dtype}, as `down` is, got {self.up.shape} in {self.up.dtype}."
            )

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]

    def with_stacks(self, up: torch.Tensor, down: torch.Tensor, number: int | None = None) -> ExpertWeights:
        """These experts, or the one of that number, with weights as plain tensors (E or 1, N, K)."""
        chosen = slice(None) if number is None else slice(number, number + 1)
        return ExpertWeights(
            up=up,
            down=down,
            up_bias=None if self.up_bias is None else self.up_bias[chosen],
            down_bias=None if self.down_bias is None else self.down_bias[chosen],
            has_gate=self.has_gate,
            is_transposed=False,
            is_concatenated=self.is_concatenated,
            activation=self.activation,
            apply=self.apply,
            post_norm=None,
        )

    def dequantize(self) -> ExpertWeights:
        """All experts as plain tensors."""
        return self.with_stacks(self.up.dequantize(), self.down.dequantize())


def quantize_experts(weights: ExpertWeights, kind: Kind, **settings: Any) -> QuantizedExperts:
    """Both projections in one format; `settings` are those of `quantize`.

    Raises:
        ValueError: as `quantize` does, or for experts whose output is normalised.
    """
    if weights.post_norm is not None:
        raise ValueError("experts whose output is normalised before it is weighted cannot be quantised.")
    up, down = (w.detach().transpose(1, 2) if weights.is_transposed else w for w in (weights.up, weights.down))
    return QuantizedExperts(
        quantize(up, kind, **settings),
        quantize(down, kind, **settings),
        weights.up_bias,
        weights.down_bias,
        weights.has_gate,
        weights.is_concatenated,
        weights.activation,
        weights.apply,
    )
