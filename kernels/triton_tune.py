"""Measure which sizes are fastest on this GPU, for the shapes of one layer. `hf-moe kernels tune` calls it.

Each kernel is tried with the config of the rule and with others around it. A config that cannot be compiled, or whose
result is not that of the rule's config, is left out. What is timed is one kernel, replayed from a graph, so that the
time Python takes to launch does not count; buffers rotate, so that nothing is found in a cache that would not be there
in a model.

T tokens, K slots of a token, S = T*K, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor

from .backward_config import down_backward_config, weight_gradient_config
from .decode_config import DecodeConfig, default_decode_config
from .expert_weights import ExpertWeights
from .tile_config import KernelConfig, next_power_of_2
from .triton_backward import down_backward, input_gradient, weight_gradient
from .triton_decode import decode, most_slots
from .triton_forward import Kind, dense_axis, down_forward, matrices, rule_config, up_forward
from .triton_routing import SlotGroups, compile_only, group_slots, tile_list
from .tuning import Config, Entry, Key, bucket, expert_key, gradient_key


ROWS = (1, 4, 16, 64, 256, 1024)
# How far apart two orders of summation in float32 may be, for results that are rounded once, relative to their norm.
_SPARE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Run: TypeAlias = Callable[[], Any]
Timer: TypeAlias = Callable[[Sequence[Run]], float]


@dataclass(frozen=True)
class LayerShape:
    """Sizes and layout of one layer of experts.

    Args:
        hidden, intermediate: H and I.
        num_experts, top_k: E and K.
        has_gate, is_transposed, is_concatenated: as `ExpertWeights` has them.

    Raises:
        ValueError: for sizes that are not positive, or a K above E.
    """

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    has_gate: bool = True
    is_transposed: bool = False
    is_concatenated: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.top_k > self.num_experts:
            raise ValueError(f"`top_k` ({self.top_k}) exceeds `num_experts` ({self.num_experts}).")


@dataclass(frozen=True)
class Problem:
    """One kernel at one size.

    Args:
        key: under which its config is kept.
        default: the config of the rule.
        candidates: others to try.
        make: number of a buffer, config -> a call that launches the kernel and returns its result.
        num_buffers: sets of operands that exist.
    """

    key: Key
    default: Config
    candidates: list[Config]
    make: Callable[[int, Config], Run]
    num_buffers: int


def tune(
    shape: LayerShape,
    dtype: torch.dtype,
    rows: Iterable[int] = ROWS,
    *,
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
    tell: Callable[[Entry], None] = lambda entry: None,
) -> list[Entry]:
    """Find the fastest config of each kernel for one layer.

    Args:
        shape: of the layer.
        dtype: of weights and tokens.
        rows: rows of an expert, rounded up to powers of 2.
        device: a GPU; anything else needs a `timer`.
        timer: calls with equal work -> microseconds of one; `time_on_gpu` if not given.
        tell: called with each entry as it is found.

    Returns:
        The entries, for `add_to_user_table`.

    Raises:
        RuntimeError: there is no GPU.
    """
    device = torch.device(device)
    if timer is None and (device.type != "cuda" or not torch.cuda.is_available()):
        raise RuntimeError("tuning measures on a GPU, and PyTorch sees none here.")
    entries = []
    for number in sorted({bucket(number) for number in rows}):
        for problem in problems(shape, dtype, number, device):
            if timer is None:
                compile_all(problem)
            entry = search(problem, timer or time_on_gpu, _SPARE[dtype])
            tell(entry)
            entries.append(entry)
    return entries


def search(problem: Problem, timer: Timer, spare: float) -> Entry:
    """The fastest config of a problem. One that is only as fast as that of the rule does not replace it.

    Args:
        problem: what to run.
        timer: see `tune`.
        spare: how far a result may be from that of the rule's config, relative to its norm.
    """
    expected = _flat(problem.make(0, problem.default)())
    best, shortest = problem.default, _time(problem, problem.default, timer)
    limit = shortest
    for config in problem.candidates:
        try:
            if not _agrees(_flat(problem.make(0, config)()), expected, spare):
                continue
            time = _time(problem, config, timer)
        except Exception as error:
            if not _is_refusal(error):
                raise
            continue
        if time < shortest:
            best, shortest = config, time
    return Entry(problem.key, best, shortest, limit)


def compile_all(problem: Problem) -> None:
    """Compile the candidates at the same time: one after the other takes longer than all that is measured.

    Triton has no means for it before 3.5; candidates are compiled as they are measured then.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        return
    with compile_only():
        for config in (problem.default, *problem.candidates):
            problem.make(0, config)()


def _time(problem: Problem, config: Config, timer: Timer) -> float:
    return timer([problem.make(number, config) for number in range(problem.num_buffers)])


def _is_refusal(error: Exception) -> bool:
    """Whether an error says that a config cannot be compiled or needs more than the device has."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, (CompilationError, OutOfResources, PTXASError)) or "PassManager" in str(error)


def _flat(result: Any) -> list[Tensor]:
    return [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor is not None]


def _agrees(found: list[Tensor], expected: list[Tensor], spare: float) -> bool:
    return all(
        bool((a.float() - b.float()).norm() <= spare * b.float().norm()) for a, b in zip(found, expected, strict=True)
    )


def time_on_gpu(calls: Sequence[Run], *, repeats: int = 20) -> float:
    """Microseconds of one call, the median over `repeats` replays of a graph that holds each of them once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the caches of PyTorch, before anything is recorded
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times[3:])


# Problems -----------------------------------------------------------------------------------------------------------


def problems(shape: LayerShape, dtype: torch.dtype, rows: int, device: torch.device) -> Iterator[Problem]:
    """The kernels of a layer where an expert has `rows` rows."""
    tokens = max(1, rows * shape.num_experts // shape.top_k)
    sets = [_Operands(shape, dtype, tokens, device, seed) for seed in range(_num_buffers(shape, dtype, device))]
    one = sets[0]
    num_slots, num = tokens * shape.top_k, len(sets)

    def tiled(call: Callable[..., Any]) -> Callable[[int, Config], Run]:
        def make(number: int, config: Any) -> Run:
            operands = sets[number]
            tiles = tile_list(operands.groups, config.BLOCK_M)  # not part of what is timed
            return lambda: call(operands, config=config, tiles=tiles)

        return make

    # The gradient of the input is a down projection by the up matrices, read along their other axis.
    turned = replace(one.weights, down=one.weights.up, down_bias=None, is_transposed=not shape.is_transposed)
    products: list[tuple[Kind, ExpertWeights, Callable[..., Any]]] = [
        ("up", one.weights, lambda o, **kw: up_forward(o.hidden, o.weights, o.groups, keep=False, **kw)),
        ("up_kept", one.weights, lambda o, **kw: up_forward(o.hidden, o.weights, o.groups, keep=True, **kw)),
        ("down", one.weights, lambda o, **kw: down_forward(o.activated, o.weights, o.groups, **kw)),
        ("down", turned, lambda o, **kw: input_gradient(o.pre, o.weights, o.groups, **kw)),
    ]
    for kind, weights, call in products:
        key, config = expert_key(kind, weights, num_slots), rule_config(kind, weights, num_slots)
        by_descriptor = dense_axis(matrices(kind, weights)) is not None
        yield Problem(key, config, tile_candidates(config, by_descriptor=by_descriptor), tiled(call), num)
    interleaved = shape.has_gate and not shape.is_concatenated
    config = down_backward_config(
        -(-num_slots // shape.num_experts),
        shape.intermediate,
        shape.hidden,
        dtype,
        num_experts=shape.num_experts,
        narrow=interleaved,
    )
    yield Problem(
        expert_key("down_backward", one.weights, num_slots),
        config,
        tile_candidates(config, by_descriptor=True, at_once=True, widest=128 if interleaved else 256),
        tiled(lambda o, **kw: down_backward(o.grad_out, o.weights, o.pre, o.factors, o.groups, **kw)),
        num,
    )
    yield _gradient_problem(sets, dtype, num_slots, up=True)
    yield _gradient_problem(sets, dtype, num_slots, up=False)
    most = most_slots(shape.num_experts)
    few = max(1, min(tokens, most // shape.top_k))
    few_rows = -(-few * shape.top_k // shape.num_experts)
    if few * shape.top_k <= most and bucket(few_rows) == bucket(rows):
        decoding = default_decode_config(one.weights)
        yield Problem(
            expert_key("decode", one.weights, few * shape.top_k),
            decoding,
            decode_candidates(decoding, shape),
            lambda number, config: lambda: sets[number].decode(few, config),
            num,
        )


def _gradient_problem(sets: list[_Operands], dtype: torch.dtype, num_slots: int, *, up: bool) -> Problem:
    one, transposed = sets[0], sets[0].weights.is_transposed
    stack = one.weights.up if up else one.weights.down
    shape = (stack.shape[0], stack.shape[1], stack.shape[2])

    def make(number: int, config: Any) -> Run:
        o = sets[number]
        left, right = (o.pre, o.hidden) if up else (o.grad_out, o.activated)
        return lambda: weight_gradient(
            left,
            right,
            o.groups,
            left_is_tokens=not up,
            right_is_tokens=up,
            out=dtype,
            transposed=transposed,
            config=config,
        )

    gathers_left = up == transposed  # a transposed gradient has its operands the other way round
    config = weight_gradient_config(-(-num_slots // shape[0]), shape[1], shape[2], dtype, gathers_left=gathers_left)
    key = gradient_key(shape, dtype, stack.device, num_slots, gathers_left=gathers_left)
    return Problem(key, config, gradient_candidates(config), make, len(sets))


class _Operands:
    """One set of random operands. All slots are used, so every row of a result is written."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype, tokens: int, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator, device=device, dtype=torch.float32) * scale).to(dtype)

        def matrices(rows: int, columns: int) -> Tensor:
            size = (columns, rows) if shape.is_transposed else (rows, columns)
            stack = torch.empty(shape.num_experts, *size, dtype=dtype, device=device)
            for matrix in stack:  # one by one: a stack in float32 may be too large
                matrix.copy_(random(*size, scale=columns**-0.5))
            return stack

        wide = (2 if shape.has_gate else 1) * shape.intermediate
        layout = ("silu", 1.0, None, 0.0, shape.has_gate, shape.is_transposed, shape.is_concatenated)
        up, down = matrices(wide, shape.hidden), matrices(shape.hidden, shape.intermediate)
        self.weights: ExpertWeights = ExpertWeights.from_layout(layout, up, down, None, None)
        chances = torch.rand(tokens, shape.num_experts, generator=generator, device=device)
        self.index = chances.topk(shape.top_k).indices.to(torch.int32)
        self.factors = torch.rand(tokens, shape.top_k, generator=generator, device=device)
        self.groups: SlotGroups = group_slots(self.index, shape.num_experts)
        self.hidden, self.grad_out = random(tokens, shape.hidden), random(tokens, shape.hidden)
        slots = tokens * shape.top_k
        self.pre, self.activated = random(slots, wide), random(slots, shape.intermediate)

    def decode(self, tokens: int, config: Any) -> Tensor:
        return decode(self.hidden[:tokens], self.weights, self.index[:tokens], self.factors[:tokens], config=config)


def _num_buffers(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> int:
    """So many sets that the weights of one are gone from the cache when it is used again; 1 if they never fit."""
    if device.type != "cuda":
        return 2
    matrices = shape.num_experts * shape.hidden * shape.intermediate * dtype.itemsize  # the smaller of the two stacks
    return min(max(1, -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // matrices)), 16)


# Candidates ---------------------------------------------------------------------------------------------------------


def tile_candidates(
    default: KernelConfig, *, by_descriptor: bool, at_once: bool = False, widest: int = 256
) -> list[Config]:
    """Tiles around that of the rule.

    Args:
        default: the rule's.
        by_descriptor: whether weights can be loaded by tensor descriptors. Without, 256 columns do not fit the
            registers.
        at_once: whether a program has one tile only, and all of it.
        widest: most columns that leave registers for what follows.
    """
    found: list[Config] = []
    modes = [(False, False)] + by_descriptor * [(True, False)] + (by_descriptor and not at_once) * [(True, True)]
    widest = widest if by_descriptor and default.BLOCK_K >= 64 else 128
    for rows in sorted({max(16, default.BLOCK_M // 2), default.BLOCK_M, min(128, 2 * default.BLOCK_M)}):
        for columns in (64, 128, 256):
            if columns > widest:
                continue
            warps, stages = (8 if rows * columns >= 128 * 128 else 4), (3 if columns == 256 else 4)
            tile = replace(default, BLOCK_M=rows, BLOCK_N=columns, num_warps=warps, num_stages=stages)
            found += [replace(tile, tma=tma, persistent=persistent) for tma, persistent in modes]
            if rows == default.BLOCK_M >= 128 and not at_once:
                found += [replace(tile, tma=tma, persistent=persistent, halves=True) for tma, persistent in modes]
    found += [replace(default, BLOCK_K=depth) for depth in (32, 64, 128)]
    found += [replace(default, num_stages=stages) for stages in (2, 3, 4)]
    found += [replace(default, num_warps=warps) for warps in (4, 8)]
    found += [replace(default, GROUP_M=group) for group in (1, 8)]
    if default.BLOCK_M >= 128 and not at_once:
        found += [replace(default, halves=True)]
    return _others(found, default)


def gradient_candidates(default: KernelConfig) -> list[Config]:
    """Tiles for gradients of weights, around that of the rule."""
    found: list[Config] = []
    for rows, columns in ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128)):
        warps = 8 if rows * columns >= 128 * 128 else 4
        for stages in (3, 4, 5, 6):
            tile = replace(default, BLOCK_M=rows, BLOCK_N=columns, num_warps=warps, num_stages=stages)
            found += [tile, replace(tile, tma=not tile.tma)] if rows >= 128 else [tile]
    found += [replace(default, BLOCK_K=step) for step in (16, 32, 64)]
    return _others(found, default)


def decode_candidates(default: DecodeConfig, shape: LayerShape) -> list[Config]:
    """Sizes for decoding, around those of the rule."""
    found: list[Config] = []
    hidden, intermediate = next_power_of_2(shape.hidden), next_power_of_2(shape.intermediate)
    for rows in (0.5, 1, 2):
        for steps in (0.5, 1, 2, 4):
            sizes: dict[str, Any] = {
                "up_rows": min(max(1, int(default.up_rows * rows)), intermediate),
                "up_step": min(max(16, int(default.up_step * steps)), hidden),
                "down_rows": min(max(1, int(default.down_rows * rows)), hidden),
                "down_step": min(max(16, int(default.down_step * steps)), intermediate),
            }
            found += [replace(default, **sizes, num_warps=warps) for warps in (4, 8)]
    found += [replace(default, num_stages=stages) for stages in (1, 2, 4)] + [replace(default, num_warps=2)]
    return _others(found, default)


def _others(found: list[Config], default: Config) -> list[Config]:
    return [config for config in dict.fromkeys(found) if config != default]
