"""Measuring sizes, with a false clock where there is no GPU, and the command that keeps them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch


pytest.importorskip("triton")

from tiny_models import tiny_model  # noqa: E402

from hf_moe_ext.cli.kernels import layer_shapes  # noqa: E402
from hf_moe_ext.cli.main import main  # noqa: E402
from hf_moe_ext.kernels import triton_experts, triton_tune, tuning  # noqa: E402
from hf_moe_ext.kernels.decode_config import DecodeConfig  # noqa: E402
from hf_moe_ext.kernels.tile_config import KernelConfig  # noqa: E402
from hf_moe_ext.kernels.tuning import Entry  # noqa: E402

from .references import DEVICE, random_experts, random_hidden  # noqa: E402
from .test_tuning import KEY, TILE, entry  # noqa: E402


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A home of caches of this test's own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    tuning.forget_tables()
    yield tmp_path / "home"
    tuning.forget_tables()


class Call:
    """What a problem makes: it knows its config, for the clock, and gives or raises what the test says."""

    def __init__(self, config: KernelConfig, result: torch.Tensor | Exception):
        self.config, self.result = config, result

    def __call__(self) -> torch.Tensor:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def search(times: dict[int, float], results: dict[int, torch.Tensor | Exception] | None = None) -> Entry:
    """Of tiles that differ in `GROUP_M`; 3 is the rule's. `times` is in the order in which they are tried."""
    results, same = results or {}, torch.ones(2, 2)
    candidates = [replace(TILE, GROUP_M=group) for group in times if group != TILE.GROUP_M]
    problem = triton_tune.Problem(
        KEY, TILE, candidates, lambda number, config: Call(config, results.get(config.GROUP_M, same)), 2
    )
    timed = []

    def timer(calls):
        timed.append(len(calls))
        return times[calls[0].config.GROUP_M]

    found = triton_tune.search(problem, timer, spare=1e-2)
    assert set(timed) == {2}, "all buffers are used"
    return found


def test_the_fastest_is_kept():
    found = search({3: 10.0, 5: 8.0, 6: 6.5, 7: 9.0})
    assert found == Entry(KEY, replace(TILE, GROUP_M=6), 6.5, 10.0)


def test_the_rule_stays_where_nothing_is_faster():
    assert search({3: 10.0, 5: 10.0, 6: 11.0}) == Entry(KEY, TILE, 10.0, 10.0)


def test_what_computes_something_else_is_left_out():
    near, far, nothing = torch.full((2, 2), 1.005), torch.full((2, 2), 1.02), torch.full((2, 2), math.nan)
    found = search({3: 10.0, 5: 1.0, 6: 2.0, 7: 3.0}, {5: far, 6: nothing, 7: near})
    assert found.config.GROUP_M == 7 and found.microseconds == 3.0


def test_what_the_device_cannot_run_is_left_out():
    from triton.runtime.errors import OutOfResources

    found = search({3: 10.0, 5: 1.0, 6: 9.0}, {5: OutOfResources(300_000, 232_448, "shared memory")})
    assert found.config.GROUP_M == 6


def test_other_errors_are_told():
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        search({3: 10.0, 5: 1.0}, {5: RuntimeError("an illegal memory access was encountered")})


@pytest.fixture
def few_candidates(monkeypatch):
    """Two tiles a kernel: the interpreter takes its time."""
    for name in ("tile_candidates", "gradient_candidates", "decode_candidates"):
        made = getattr(triton_tune, name)
        monkeypatch.setattr(triton_tune, name, lambda *args, make=made, **kwargs: make(*args, **kwargs)[:2])


@pytest.mark.parametrize("transposed", [False, True])
def test_tuning_answers_all_that_a_layer_asks(home, monkeypatch, few_candidates, transposed):
    shape = triton_tune.LayerShape(32, 16, 3, 2, is_transposed=transposed, is_concatenated=not transposed)
    ticks = iter(range(10_000, 0, -1))  # each one is faster than the one before
    told: list[Entry] = []

    def timer(calls):
        for call in calls:
            call()
        return float(next(ticks))

    entries = triton_tune.tune(shape, torch.float32, [2, 3, 4], device=DEVICE, timer=timer, tell=told.append)
    assert entries == told and {one.key.rows for one in entries} == {2, 4} and len({one.key for one in entries}) == 15
    assert all(one.microseconds < one.default_microseconds for one in entries)
    tuning.add_to_user_table(entries)
    weights = random_experts(3, hidden=32, intermediate=16, layout="plain_transposed" if transposed else "stock")
    if transposed:
        weights = replace(weights, has_gate=True, up=torch.randn(3, 32, 32, device=DEVICE))
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]], device=DEVICE)
    hidden, factors = random_hidden(5, 32), torch.rand(5, 2, device=DEVICE)
    asked, lookup = [], tuning.lookup
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "lookup", lambda key: asked.append(lookup(key)) or asked[-1])
        _, kept = triton_experts.forward(hidden, index, factors, weights)
        needs = [True, True, True, True, False, False]
        triton_experts.backward(torch.ones_like(hidden), hidden, index, factors, weights, kept, needs)
        for tokens in (5, 3):  # the second decodes
            triton_experts.infer(hidden[:tokens], index[:tokens], factors[:tokens], weights)
    assert len(asked) == 9 and None not in asked


def test_candidates_are_many_but_not_too_many():
    shape = triton_tune.LayerShape(2048, 768, 128, 8)
    rule = KernelConfig(128, 256, 64, 8, 3, persistent=True, tma=True)
    gradient = KernelConfig(128, 256, 64, 8, 5, tma=True)
    decoding = DecodeConfig()
    sets = {
        "tiles": (rule, triton_tune.tile_candidates(rule, by_descriptor=True)),
        "pointers": (rule, triton_tune.tile_candidates(replace(rule, BLOCK_N=128), by_descriptor=False)),
        "gradients": (gradient, triton_tune.gradient_candidates(gradient)),
        "backward": (rule, triton_tune.tile_candidates(rule, by_descriptor=True, at_once=True)),
        "decode": (decoding, triton_tune.decode_candidates(decoding, shape)),
    }
    for name, (default, found) in sets.items():
        assert default not in found and len(set(found)) == len(found) and 10 <= len(found) <= 50, name
    assert all(tile.BLOCK_N <= 128 and not (tile.persistent and tile.BLOCK_N > 128) for tile in sets["pointers"][1])


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"top_k": 9}])
def test_a_layer_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        triton_tune.LayerShape(**{"hidden": 8, "intermediate": 8, "num_experts": 8, "top_k": 2, **wrong})


@pytest.mark.gpu
def test_tuning_on_a_gpu(home, few_candidates):
    shape = triton_tune.LayerShape(256, 128, 8, 2)
    entries = triton_tune.tune(shape, torch.bfloat16, [1, 64])
    assert len(entries) == 15 and all(0 < one.microseconds <= one.default_microseconds for one in entries)
    assert all(tuning.lookup(one.key) == one.config for one in entries if tuning.add_to_user_table([one]))


# The command --------------------------------------------------------------------------------------------------------

SIZES = ["--hidden", "64", "--intermediate", "32", "--experts", "4", "--top_k", "2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(home, capsys):
    assert main(["kernels", "tune", *SIZES]) == 1
    assert "PyTorch sees none here" in capsys.readouterr().err and not home.exists()
    with pytest.raises(RuntimeError, match="PyTorch sees none here"):
        triton_tune.tune(triton_tune.LayerShape(8, 8, 2, 1), torch.float32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either `--model`"),
        (SIZES[:-2], "give either `--model`"),
        (["--model", "x", *SIZES], "give either `--model`"),
        ([*SIZES, "--dtype", "int8"], "`--dtype` must be"),
        ([*SIZES, "--rows", "2048"], "`--rows` must be"),
    ],
)
def test_wrong_usage(home, capsys, words, message):
    assert main(["kernels", "tune", *words]) == 2
    assert message in capsys.readouterr().err and not home.exists()


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["import"], 2)])
def test_actions(capsys, words, code):
    assert main(["kernels", *words]) == code
    out, err = capsys.readouterr()
    assert "export" in out + err and "tune" in out + err


def test_what_was_measured_is_kept(home, monkeypatch, capsys, tmp_path):
    tiny_model("mixtral").config.save_pretrained(tmp_path / "model")
    asked = []

    def tune(shape, dtype, rows, tell):
        asked.append((shape, dtype, list(rows)))
        tell(entry())
        return [entry()]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_tune, "tune", tune)
    assert main(["kernels", "tune", *SIZES, "--rows", "1", "8", "--dtype", "float16"]) == 0
    assert main(["kernels", "tune", "--model", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "100.5 us, 2.00 times as fast as by rule" in out and str(tuning.user_table_path()) in out
    assert asked[0] == (triton_tune.LayerShape(64, 32, 4, 2), torch.float16, [1, 8])
    config = tiny_model("mixtral").config
    sizes = (config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok)
    assert asked[1] == (triton_tune.LayerShape(*sizes), torch.bfloat16, list(triton_tune.ROWS))
    assert tuning.read_table(tuning.user_table_path()) == [entry()]


def test_a_damaged_table_is_told_before_anything_is_measured(home, monkeypatch, capsys):
    tuning.user_table_path().parent.mkdir(parents=True)
    tuning.user_table_path().write_text("{")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_tune, "tune", lambda *args, **kwargs: pytest.fail("it was measured"))
    assert main(["kernels", "tune", *SIZES]) == 1
    assert str(tuning.user_table_path()) in capsys.readouterr().err


def test_the_shapes_of_a_model():
    model = tiny_model("gpt_oss")
    (shape,) = layer_shapes(model, "gpt_oss")
    config = model.config
    sizes = (config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok)
    assert shape == triton_tune.LayerShape(*sizes, has_gate=True, is_transposed=True, is_concatenated=False)
    with pytest.raises(ValueError, match="no experts"):
        layer_shapes(tiny_model("llama"), "llama")
