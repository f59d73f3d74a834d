"""The counting sort and the list of tiles, against a loop."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.references import DEVICE, ROUTING_CASES, group_slots_reference


pytest.importorskip("triton")

from hf_moe_ext.kernels.triton_routing import SMALL, group_slots, tile_list  # noqa: E402


FIELDS = ("offsets", "row_of_slot", "slot_of_row")


def fill_with_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` of integers holds a number that is no row, no slot and no expert."""
    empty = torch.empty

    def garbage(*args, **kwargs):
        return empty(*args, **kwargs).fill_(-77)

    monkeypatch.setattr(torch, "empty", garbage)


def check(index: torch.Tensor, num_experts: int, **kwargs: int) -> None:
    found, expected = group_slots(index, num_experts, **kwargs), group_slots_reference(index, num_experts)
    assert (found.num_experts, found.slots_per_token) == (num_experts, index.shape[1])
    for name in FIELDS:
        assert getattr(found, name).dtype == torch.int32
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# 16 slots a program: every case that has more goes through the three launches; 2048: all of them through the one
@pytest.mark.parametrize("block_slots", [16, 32, SMALL])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", ROUTING_CASES)
def test_groups(case, dtype, block_slots, monkeypatch):
    fill_with_garbage(monkeypatch)
    index, num_experts = ROUTING_CASES[case]
    check(index.to(DEVICE, dtype), num_experts, block_slots=block_slots)


@pytest.mark.parametrize("block_slots", [16, SMALL])
def test_ids_are_compared_before_they_are_narrowed(block_slots, monkeypatch):
    """2**32 + 1 is an unused slot, not expert 1; so is a negative id."""
    fill_with_garbage(monkeypatch)
    index = torch.tensor([[2**32 + 1, 1], [0, 2**40], [-1, 2], [2**62, 0]], dtype=torch.int64).repeat(6, 1).to(DEVICE)
    check(index, 3, block_slots=block_slots)


@pytest.mark.parametrize("block_slots", [16, SMALL])
def test_layouts_of_the_index(block_slots):
    index, num_experts = ROUTING_CASES["unused"]
    index = index.to(DEVICE)
    wide = torch.full((index.shape[0] * 2, index.shape[1] * 3), 0, dtype=index.dtype, device=DEVICE)
    wide[::2, 1::3] = index
    for view in (index.t().contiguous().t(), wide[::2, 1::3]):
        assert not view.is_contiguous() and torch.equal(view, index)
        check(view, num_experts, block_slots=block_slots)


def test_many_slots():
    """Several chunks of the scan: 600 blocks of 16 slots, 600 experts."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 640, (1200, 8), generator=generator).to(DEVICE)
    check(index, 600, block_slots=16)


def test_two_runs_agree():
    index, num_experts = ROUTING_CASES["unused"]
    first, second = (group_slots(index.to(DEVICE), num_experts, block_slots=16) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


@pytest.mark.parametrize("block_rows", [1, 4, 16, 128])
@pytest.mark.parametrize("case", ROUTING_CASES)
def test_tiles(case, block_rows, monkeypatch):
    fill_with_garbage(monkeypatch)
    index, num_experts = ROUTING_CASES[case]
    groups = group_slots(index.to(DEVICE), num_experts)
    offsets = group_slots_reference(index, num_experts).offsets.tolist()
    expected = [
        [expert, row]
        for expert in range(num_experts)
        for row in range(offsets[expert], offsets[expert + 1], block_rows)
    ]
    bound = index.numel() // block_rows + min(num_experts, index.numel())
    expected += [[-1, -1]] * (bound - len(expected))

    found = tile_list(groups, block_rows)

    assert found.dtype == torch.int32 and found.tolist() == expected


def test_a_long_tile_list_takes_several_chunks():
    index = torch.full((300, 1), 1, dtype=torch.int32, device=DEVICE)
    tiles = tile_list(group_slots(index, 3), 1)
    assert tiles.tolist() == [[1, row] for row in range(300)] + [[-1, -1]] * 3


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"`index` must be \(T, K\) of int32 or int64, got \(4,\) of torch.int32"):
        group_slots(torch.zeros(4, dtype=torch.int32), 2)
    with pytest.raises(ValueError, match="of torch.float32"):
        group_slots(torch.zeros(4, 2), 2)
    with pytest.raises(ValueError, match="too many for int32"):
        group_slots(torch.zeros(4, 2, dtype=torch.int32), 2**22)
