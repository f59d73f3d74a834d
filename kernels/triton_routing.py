"""Slots sorted by expert, and the list of tiles, on the device and without waiting for it.

What all Triton files share stands here too: `SlotGroups`, `Launch` and how a device is chosen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_config import next_power_of_2


SMALL = (
    512  # slots that one program sorts alone: more take longer to sort than two more launches, of half as many each
)


@dataclass(frozen=True)
class SlotGroups:
    """Slots sorted by expert: rows `offsets[e]` to `offsets[e + 1]` belong to expert e, `offsets[E]` rows in all.

    Row r reads token `slot_of_row[r] // K`. Buffers over rows have S = T*K of them; what lies past `offsets[E]` is
    never written, and never used.

    Args:
        offsets: (E+1,) int32.
        row_of_slot: (S,) int32, -1 for an unused slot.
        slot_of_row: (S,) int32, 0 past `offsets[E]`.
        num_experts: E.
        slots_per_token: K.
    """

    offsets: Tensor
    row_of_slot: Tensor
    slot_of_row: Tensor
    num_experts: int
    slots_per_token: int
    tiles: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)  # what `tile_list` has made


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, made before it happens, so that it can also be compiled without a device.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: number of programs along each axis.
        arguments: by name, all of them.
        num_warps, num_stages: as Triton has them.
        uses_wgmma: whether its products should become warp-group instructions on sm_90 (at least 64 rows in 16 bits).
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    num_warps: int = 4
    num_stages: int = 3
    uses_wgmma: bool = False

    def run(self, like: Tensor) -> None:
        """Launch on the device of `like`, which need not be the current one; nothing if there is no program."""
        if 0 not in self.grid:
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            with on_device(like):
                if _compiles_only.get():
                    self.kernel.warmup(grid=self.grid, **self.arguments, **options)
                else:
                    self.kernel[self.grid](**self.arguments, **options)


_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


@contextmanager
def compile_only(workers: int | None = None) -> Iterator[None]:
    """Launches inside do not happen: their kernels are compiled, several at a time, and are there afterwards.

    A kernel that cannot be compiled raises when it is launched for real, not here.

    Args:
        workers: kernels that are compiled at a time; as many as there are processors if not given.
    """
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        token = _compiles_only.set(True)
        try:
            yield
        finally:
            _compiles_only.reset(token)


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's device the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _experts_of(
    index_ptr: tl.tensor,
    slot: tl.tensor,
    num_slots: tl.tensor,
    num_experts: tl.tensor,
    slots_per_token: tl.tensor,
    stride_token: tl.tensor,
    stride_slot: tl.tensor,
) -> tl.tensor:
    """What the slots chose, E for an unused one and past the end."""
    token, k = slot // slots_per_token, slot % slots_per_token
    at = index_ptr + token.to(tl.int64) * stride_token + k.to(tl.int64) * stride_slot
    # Compared before it is narrowed: any id outside 0..E-1 means an unused slot.
    expert = tl.load(at, mask=slot < num_slots, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


@triton.jit
def _group_few(
    index_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    row_of_slot_ptr: tl.tensor,
    slot_of_row_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_experts: tl.tensor,
    slots_per_token: tl.tensor,
    stride_token: tl.tensor,
    stride_slot: tl.tensor,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    """All slots in one program: what is sorted is in its row."""
    row = tl.arange(0, BLOCK)
    unsorted = _experts_of(index_ptr, row, num_slots, num_experts, slots_per_token, stride_token, stride_slot)
    key = tl.sort(unsorted * BLOCK + row)
    slot, expert = key % BLOCK, key // BLOCK
    used = expert < num_experts
    tl.store(slot_of_row_ptr + row, tl.where(used, slot, 0), mask=row < num_slots)
    tl.store(row_of_slot_ptr + slot, tl.where(used, row, -1), mask=slot < num_slots)
    number, count = tl.arange(0, BINS), tl.histogram(unsorted, BINS)
    tl.store(offsets_ptr + number, tl.cumsum(count, 0) - count, mask=number <= num_experts)


@triton.jit
def _count_slots(
    index_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_experts: tl.tensor,
    slots_per_token: tl.tensor,
    stride_token: tl.tensor,
    stride_slot: tl.tensor,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    """counts[b, e]: slots of block b that chose expert e; column E counts the others."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = _experts_of(index_ptr, slot, num_slots, num_experts, slots_per_token, stride_token, stride_slot)
    tl.store(counts_ptr + block.to(tl.int64) * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit
def _scan_counts(
    counts_ptr: tl.tensor,
    earlier_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some experts in each program: earlier[b, e], their slots in the blocks before b, and totals[e]."""
    number = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        at = block.to(tl.int64)[:, None] * BINS + number[None, :]
        count = tl.load(counts_ptr + at, mask=block[:, None] < num_blocks, other=0)
        earlier = before[None, :] + tl.cumsum(count, 0) - count
        tl.store(earlier_ptr + at, earlier, mask=block[:, None] < num_blocks)
        before += tl.sum(count, 0)
    tl.store(totals_ptr + number, before)


@triton.jit
def _place_slots(
    index_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    earlier_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    row_of_slot_ptr: tl.tensor,
    slot_of_row_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_experts: tl.tensor,
    slots_per_token: tl.tensor,
    stride_token: tl.tensor,
    stride_slot: tl.tensor,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    """Every slot of a block to its row, which also counts the rows past the end, that unused slots fill with 0."""
    block = tl.program_id(0)
    position, number = tl.arange(0, BLOCK), tl.arange(0, BINS)
    total = tl.load(totals_ptr + number)
    offset = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets_ptr + number, offset, mask=number <= num_experts)
    # The slots of an expert lie side by side in the sorted block, in the order of their rows.
    at = block.to(tl.int64) * BINS + number
    count = tl.load(counts_ptr + at)
    shift = offset + tl.load(earlier_ptr + at) - (tl.cumsum(count, 0) - count)
    slot = block * BLOCK + position
    expert = _experts_of(index_ptr, slot, num_slots, num_experts, slots_per_token, stride_token, stride_slot)
    key = tl.sort(expert * BLOCK + position)
    slot, expert = block * BLOCK + key % BLOCK, key // BLOCK
    used = expert < num_experts
    row = tl.gather(shift, expert, 0) + position
    tl.store(row_of_slot_ptr + slot, tl.where(used, row, -1), mask=slot < num_slots)
    tl.store(slot_of_row_ptr + row, tl.where(used, slot, 0), mask=slot < num_slots)


def group_slots(index: Tensor, num_experts: int, *, block_slots: int | None = None) -> SlotGroups:
    """Sort slots by expert: a counting sort, stable, so that two runs agree.

    Up to `block_slots` slots take one launch, more take three.

    Args:
        index: (T, K) int32 or int64, in any layout. Ids outside 0..E-1 are unused slots and get no row.
        num_experts: E.
        block_slots: slots that one program sorts, a power of 2; by the number of slots if not given.

    Raises:
        ValueError: `index` is not 2-D or not of these types, or there are more slots or experts than int32 can count.
    """
    if index.ndim != 2 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`index` must be (T, K) of int32 or int64, got {tuple(index.shape)} of {index.dtype}.")
    num_slots, slots_per_token = index.numel(), index.shape[1]
    block_slots = block_slots or _block_slots(num_slots)
    if num_slots >= 2**31 - block_slots or (num_experts + 1) * block_slots >= 2**31:
        raise ValueError(f"{num_slots} slots of {num_experts} experts are too many for int32.")
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=index.device)
    row_of_slot, slot_of_row = torch.empty(2, num_slots, dtype=torch.int32, device=index.device).unbind(0)
    groups = SlotGroups(offsets, row_of_slot, slot_of_row, num_experts, slots_per_token)
    if num_slots == 0:
        offsets.zero_()
    for launch in _group_launches(index, groups, block_slots):
        launch.run(index)
    return groups


def _block_slots(num_slots: int) -> int:
    return SMALL if num_slots <= SMALL else SMALL // 2


def _group_launches(index: Tensor, groups: SlotGroups, block_slots: int) -> list[Launch]:
    num_slots, num_experts = index.numel(), groups.num_experts
    block, bins = min(block_slots, max(next_power_of_2(num_slots), 16)), next_power_of_2(num_experts + 1)
    slots = {
        "index_ptr": index,
        "num_slots": num_slots,
        "num_experts": num_experts,
        "slots_per_token": groups.slots_per_token,
        "stride_token": index.stride(0),
        "stride_slot": index.stride(1),
        "BLOCK": block,
        "BINS": bins,
    }
    rows = {"row_of_slot_ptr": groups.row_of_slot, "slot_of_row_ptr": groups.slot_of_row}
    warps = 8 if block >= 1024 else 4
    if num_slots <= block:
        few = {**slots, **rows, "offsets_ptr": groups.offsets}
        return [Launch(_group_few, (1 if num_slots else 0,), few, num_warps=warps)]
    num_blocks = triton.cdiv(num_slots, block)
    counts, earlier = torch.empty(2, num_blocks, bins, dtype=torch.int32, device=index.device).unbind(0)
    totals = torch.empty(bins, dtype=torch.int32, device=index.device)
    tables = {"counts_ptr": counts, "earlier_ptr": earlier, "totals_ptr": totals}
    columns = min(8, bins)
    scan = {**tables, "num_blocks": num_blocks, "BINS": bins, "COLUMNS": columns}
    scan["BLOCK"] = min(4096 // columns, next_power_of_2(num_blocks))
    place = {**slots, **rows, **tables, "offsets_ptr": groups.offsets}
    return [
        Launch(_count_slots, (num_blocks,), {**slots, "counts_ptr": counts}, num_warps=warps),
        Launch(_scan_counts, (bins // columns,), scan, num_warps=4),
        Launch(_place_slots, (num_blocks,), place, num_warps=warps),
    ]


@triton.jit
def _list_tiles(
    offsets_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_experts: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Program e writes the tiles of expert e, program E the unused end of the list."""
    mine, number = tl.program_id(0), tl.arange(0, BINS)
    first = tl.load(offsets_ptr + number, mask=number < num_experts, other=0)
    last = tl.load(offsets_ptr + number + 1, mask=number < num_experts, other=0)
    tiles = (last - first + BLOCK_ROWS - 1) // BLOCK_ROWS
    begin = tl.sum(tl.where(number < mine, tiles, 0))
    first_row = tl.sum(tl.where(number == mine, first, 0))
    is_end = mine == num_experts
    count = tl.where(is_end, num_tiles - begin, tl.sum(tl.where(number == mine, tiles, 0)))
    for done in range(0, count, CHUNK):
        i = done + tl.arange(0, CHUNK)
        at = tiles_ptr + (begin + i).to(tl.int64) * 2
        tl.store(at, tl.where(is_end, -1, mine), mask=i < count)
        tl.store(at + 1, tl.where(is_end, -1, first_row + i * BLOCK_ROWS), mask=i < count)


def tile_list(groups: SlotGroups, block_rows: int) -> Tensor:
    """Tiles of at most `block_rows` rows, each of one expert, in the order of the rows.

    Returns:
        (S // block_rows + min(E, S), 2) int32: expert and first row, (-1, -1) where unused. The length is a bound that
        the host knows: each expert has at most one tile that is not full. The groups keep it: products that are cut
        alike share one list.
    """
    found = groups.tiles.get(block_rows)
    if found is None:
        launch, found = _tile_launch(groups, block_rows)
        launch.run(found)
        if not _compiles_only.get():
            groups.tiles[block_rows] = found
    return found


def _tile_launch(groups: SlotGroups, block_rows: int) -> tuple[Launch, Tensor]:
    num_slots, num_experts = groups.slot_of_row.numel(), groups.num_experts
    bound = num_slots // block_rows + min(num_experts, num_slots)
    tiles = torch.empty(bound, 2, dtype=torch.int32, device=groups.offsets.device)
    arguments = {
        "offsets_ptr": groups.offsets,
        "tiles_ptr": tiles,
        "num_experts": num_experts,
        "num_tiles": bound,
        "BLOCK_ROWS": block_rows,
        "BINS": next_power_of_2(num_experts),
        "CHUNK": 128,
    }
    return Launch(_list_tiles, (num_experts + 1 if bound else 0,), arguments), tiles


def compile_cases() -> dict[str, Launch]:
    """Launches at the size of real models, on tensors without data."""
    cases = {}
    for tokens, slots, experts in ((64, 8, 128), (16384, 8, 128), (8192, 10, 513)):
        index = torch.empty(tokens, slots, dtype=torch.int64, device="meta")
        row = torch.empty(index.numel(), dtype=torch.int32, device="meta")
        groups = SlotGroups(row.new_empty(experts + 1), row, row, experts, slots)
        launches = [*_group_launches(index, groups, _block_slots(tokens * slots)), _tile_launch(groups, 128)[0]]
        cases.update({f"{launch.kernel.__name__}-{tokens}x{slots}-{experts}": launch for launch in launches})
    return cases
