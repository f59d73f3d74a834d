"""Measured sizes: what a table holds, and what launches take from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch


pytest.importorskip("triton")

from hf_moe_ext.kernels import (  # noqa: E402
    triton_backward,
    triton_decode,
    triton_experts,
    triton_forward,
    triton_gradients,
    tuning,
)
from hf_moe_ext.kernels.decode_config import DecodeConfig  # noqa: E402
from hf_moe_ext.kernels.tile_config import KernelConfig  # noqa: E402
from hf_moe_ext.kernels.triton_routing import Launch, group_slots  # noqa: E402
from hf_moe_ext.kernels.tuning import Entry, Key  # noqa: E402

from .references import (  # noqa: E402
    DEVICE,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    experts_reference,
    random_experts,
    random_hidden,
    relative_error,
)


ROOT = Path(__file__).resolve().parents[2]
HERE = tuning.device_name(torch.device(DEVICE))
KEY = Key("some GPU", "up", False, "bfloat16", 1536, 2048, 64)
TILE = KernelConfig(32, 64, 32, num_warps=8, num_stages=2, GROUP_M=3, persistent=True, tma=True)


def entry(key: Key = KEY, config: tuning.Config = TILE) -> Entry:
    return Entry(key, config, 100.5, 201.25)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A home of caches of this test's own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    tuning.forget_tables()
    yield tmp_path / "home"
    tuning.forget_tables()


def shipped(monkeypatch, tmp_path, *entries: Entry) -> None:
    tuning.write_table(tmp_path / "shipped.json", entries)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped.json")
    tuning.forget_tables()


# Keys and tables ----------------------------------------------------------------------------------------------------


def test_the_package_claims_nothing_that_was_not_measured():
    """One device, in bfloat16, and nothing that is slower than the rule of its day."""
    entries = tuning.read_table(tuning.SHIPPED)
    assert {(entry.key.device, entry.key.dtype) for entry in entries} == {("NVIDIA H100 80GB HBM3", "bfloat16")}
    assert len({entry.key for entry in entries}) == len(entries)
    assert all(entry.microseconds <= entry.default_microseconds for entry in entries)


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (1024, 1024), (10**6, 1024)]
)
def test_rows_count_as_a_power_of_two(rows, expected):
    assert tuning.bucket(rows) == expected


def test_the_number_of_tokens_is_no_key():
    weights = random_experts()
    keys = {tuning.expert_key("up", weights, EXPERTS * 33 + extra) for extra in range(0, 31 * EXPERTS + 1, 7)}
    assert {key.rows for key in keys} == {64} and len(keys) == 1


def test_float32_that_may_be_rounded_is_another_type():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision, expected in (("ieee", "float32"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert tuning.dtype_name(torch.float32) == expected
            assert tuning.dtype_name(torch.bfloat16) == "bfloat16"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    "wrong",
    [{"kernel": "across"}, {"dtype": "int8"}, {"n": 0}, {"k": 1.5}, {"rows": 3}, {"rows": 2048}, {"transposed": 1}],
)
def test_a_key_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(KEY, **wrong)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    decoding = replace(KEY, kernel="decode", dtype="float16", rows=1)
    entries = [
        entry(),
        entry(replace(KEY, dtype="tf32"), replace(TILE, precision="tf32")),
        entry(replace(KEY, dtype="float32"), replace(TILE, precision="ieee")),
        entry(decoding, DecodeConfig(up_rows=4, num_stages=3, activated_in_float32=False)),
    ]
    path = tmp_path / "table.json"
    tuning.write_table(path, entries)
    assert sorted(map(repr, tuning.read_table(path))) == sorted(map(repr, entries))
    tuning.write_table(path, [*entries, entry(KEY, replace(TILE, BLOCK_M=16))])
    found = {one.key: one.config for one in tuning.read_table(path)}
    assert len(found) == 4 and found[KEY] == replace(TILE, BLOCK_M=16)
    tuning.write_table(path, [])
    assert tuning.read_table(path) == []


def damaged() -> dict[str, str]:
    good = tuning._item(entry())

    def table(**changes) -> str:
        return json.dumps({"format": 1, "entries": [{**good, **changes}]})

    return {
        "not valid JSON": '{"format": 1,',
        "no `format`": "[]",
        "no `entries`": '{"format": 1}',
        "format 2, this version": '{"format": 2, "entries": []}',
        "entry 0": '{"format": 1, "entries": [3]}',
        "unknown ['tokens']": table(tokens=7),
        "`BLOCK_M` must be a power of 2": table(config={"BLOCK_M": 24}),
        "`num_warps` must be of type int": table(config={"num_warps": "4"}),
        "`tma` must be of type bool": table(config={"tma": 1}),
        "`num_stages` must be positive": table(config={"num_stages": 0}),
        "BLOCK_X": table(config={"BLOCK_X": 16}),
        "`precision` is chosen": table(config={"precision": "tf32"}),
        "`kernel` must be": table(kernel="other"),
        "`rows` must be": table(rows=True),
        "times must be": table(microseconds=-1),
    }


@pytest.mark.parametrize("message", damaged())
def test_a_damaged_table_is_named(home, message):
    path = tuning.user_table_path()
    path.parent.mkdir(parents=True)
    path.write_text(damaged()[message])
    for read in (lambda: tuning.lookup(KEY), lambda: tuning.add_to_user_table([entry()])):
        with pytest.raises(ValueError) as error:
            read()
        assert message in str(error.value) and str(path) in str(error.value)
    assert path.read_text() == damaged()[message], "what cannot be read is not overwritten"


def test_an_import_reads_no_table(home):
    path = tuning.user_table_path()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    code = "import hf_moe_ext, hf_moe_ext.kernels.triton_experts, hf_moe_ext.kernels.tuning"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment, timeout=120)


def test_a_failure_leaves_the_old_table(home, monkeypatch):
    path = tuning.add_to_user_table([entry()])
    before = path.read_bytes()
    assert path.is_relative_to(home)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.add_to_user_table([entry(replace(KEY, rows=128))])
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


# Looking up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        ({}, True),
        ({"n": 1024}, True),
        ({"n": 768}, True),
        ({"n": 767}, False),
        ({"k": 4096}, True),
        ({"k": 4097}, False),
        ({"rows": 32}, True),
        ({"rows": 128}, True),
        ({"rows": 16}, False),
        ({"device": "another GPU"}, False),
        ({"kernel": "down"}, False),
        ({"transposed": True}, False),
        ({"dtype": "float16"}, False),
    ],
)
def test_what_is_near(home, other, is_near):
    tuning.add_to_user_table([entry()])
    assert tuning.lookup(replace(KEY, **other)) == (TILE if is_near else None)
    rule = replace(TILE, BLOCK_M=128)
    assert tuning.config_for(replace(KEY, **other), lambda: rule) == (TILE if is_near else rule)


def test_the_nearest_counts(home):
    sizes = {16: (1536, 16), 32: (1536, 32), 64: (1600, 64), 128: (2048, 64)}
    entries = [entry(replace(KEY, n=n, rows=rows), replace(TILE, BLOCK_M=block)) for block, (n, rows) in sizes.items()]
    tuning.add_to_user_table(entries)
    found = {rows: tuning.lookup(replace(KEY, rows=rows)).BLOCK_M for rows in (8, 16, 32, 64, 128)}
    assert found == {8: 16, 16: 16, 32: 32, 64: 64, 128: 64}


def test_of_two_as_near_the_one_with_fewer_rows(home):
    for order in (1, -1):
        both = [entry(replace(KEY, rows=rows), replace(TILE, BLOCK_M=rows)) for rows in (32, 128)]
        tuning.add_to_user_table(both[::order])
        assert tuning.lookup(KEY).BLOCK_M == 32


def test_both_tables_count(home, monkeypatch, tmp_path):
    theirs, mine = replace(TILE, BLOCK_M=64), replace(TILE, BLOCK_M=128)
    shipped(monkeypatch, tmp_path, entry(KEY, theirs))
    assert tuning.lookup(KEY) == theirs
    tuning.add_to_user_table([entry(replace(KEY, rows=128), mine)])
    assert tuning.lookup(KEY) == theirs and tuning.lookup(replace(KEY, rows=128)) == mine
    tuning.add_to_user_table([entry(KEY, mine)])
    assert tuning.lookup(KEY) == mine


# Launches -----------------------------------------------------------------------------------------------------------


def entries_of_the_layer(transposed: bool, rows: int) -> list[Entry]:
    """One config for each launch of a layer, which no rule would give, with keys written out by hand."""
    wide = 2 * INTERMEDIATE
    gradients = [(HIDDEN, wide), (INTERMEDIATE, HIDDEN)] if transposed else [(wide, HIDDEN), (HIDDEN, INTERMEDIATE)]
    places = [
        ("up_kept", transposed, wide, HIDDEN),
        ("down", transposed, HIDDEN, INTERMEDIATE),
        ("down_backward", not transposed, INTERMEDIATE, HIDDEN),
        ("down", not transposed, HIDDEN, wide),
        *(
            ("weight_gradient", is_up == transposed, *sizes)
            for is_up, sizes in zip((True, False), gradients, strict=True)
        ),
    ]
    odd = KernelConfig(16, 16, 16, num_warps=2, num_stages=1)
    found = [
        entry(Key(HERE, kernel, flag, "float32", n, k, rows), replace(odd, GROUP_M=5 + number))
        for number, (kernel, flag, n, k) in enumerate(places)
    ]
    decoding = Key(HERE, "decode", transposed, "float32", HIDDEN, INTERMEDIATE, rows)
    return [*found, entry(decoding, DecodeConfig(up_rows=4, up_step=16, down_rows=2, down_step=32))]


@pytest.mark.parametrize("layout", ["stock", "gpt_oss"])
def test_every_launch_asks_the_table(home, monkeypatch, layout):
    weights = random_experts(layout=layout)
    index = torch.randint(EXPERTS, (8, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)  # 4 rows an expert
    tuning.add_to_user_table(entries_of_the_layer(weights.is_transposed, 4))
    seen: list[tuple[str, int]] = []

    def record(launch, like):
        name, known = launch.kernel.__name__, launch.arguments
        if "GROUP_M" in known:
            seen.append((name, known["GROUP_M"]))
            assert (launch.num_warps, launch.num_stages, known["BLOCK_N"]) == (2, 1, 16)
        elif "STEP" in known:
            seen.append((name, known["ROWS"]))

    groups = group_slots(index, EXPERTS)
    monkeypatch.setattr(Launch, "run", record)
    hidden, factors = random_hidden(8), torch.rand(8, 2, device=DEVICE)
    activated, pre = triton_forward.up_forward(hidden, weights, groups, keep=True)
    triton_forward.down_forward(activated, weights, groups)
    triton_backward.down_backward(hidden, weights, pre, factors, groups)
    triton_gradients.input_gradient(pre, weights, groups)
    for left, right, is_up in ((pre, hidden, True), (hidden, activated, False)):
        triton_gradients.weight_gradient(
            left,
            right,
            groups,
            left_is_tokens=not is_up,
            right_is_tokens=is_up,
            out=torch.float32,
            transposed=weights.is_transposed,
        )
    triton_decode.decode(hidden, weights, index, factors)
    assert [number for _, number in seen] == [5, 6, 7, 8, 9, 10, 4, 2], seen


def test_a_layer_with_sizes_of_a_table(home):
    weights, hidden, factors = random_experts(), random_hidden(8), torch.rand(8, 2, device=DEVICE)
    index = torch.randint(EXPERTS, (8, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tuning.add_to_user_table(entries_of_the_layer(False, 4))
    out = triton_experts.forward(hidden, index, factors, weights)[0]
    expected = experts_reference(hidden, weights, index, factors)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(triton_experts.infer(hidden, index, factors, weights), expected) < 1e-5
