"""Expert parallelism on two processes of a CPU equals one process: single layers in float64 against one token and one
slot at a time, whole models through `from_pretrained(distributed_config=...)`.

pytest starts this file as a program, twice: once for the layers, once for the models. The program runs all cases and
writes what went wrong in which; the tests read that.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import hf_moe_ext as moe
from hf_moe_ext.kernels.expert_weights import read_experts
from hf_moe_ext.modeling.moe_context import RoutingLink
from hf_moe_ext.modeling.moe_experts import RoutedExperts
from hf_moe_ext.modeling.moe_install import install
from tests.kernels.references import experts_reference, relative_error


try:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import EPImplementationInterface
    from transformers.distributed.utils import initialize_distributed_mesh

    from hf_moe_ext import expert_parallel
except ImportError:
    pytest.skip("transformers has no interface for expert parallelism before 5.23", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
RANKS, EXPERTS, HIDDEN, INTERMEDIATE, SLOTS = 2, 6, 8, 12, 3
# Rounding of a few hundred terms.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
LAYOUTS = {"shared": {"tp_size": RANKS}, "different": {"fsdp_size": RANKS}}  # the ranks hold one batch, or two


# Layers -------------------------------------------------------------------------------------------------------------


def chosen(tokens: int, seed: int, *, unused: bool = False) -> Tensor:
    """(T, K): different experts for each token; with `unused`, a third of the slots and all of token 1 are unused."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :SLOTS]
    if unused:
        index[torch.rand(index.shape, generator=generator) < 1 / 3] = EXPERTS
        index[1], index[2, 0] = torch.tensor([EXPERTS, EXPERTS + 3, 2**31 - 1]), EXPERTS + 1
    return index


# Name -> ids on rank 0 and on rank 1. Where the batch is shared, it is that of rank 0.
ROUTING = {
    "plain": (chosen(9, 0), chosen(6, 1)),
    "unused": (chosen(9, 2, unused=True), chosen(7, 3, unused=True)),
    "rank_0_gets_nothing": (chosen(5, 4) % 3 + 3, chosen(4, 5) % 3 + 3),  # and experts stand twice in a token
    "nobody_gets_anything": (torch.full((4, 2), EXPERTS), torch.full((3, 2), EXPERTS + 2)),
    "no_tokens": (torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)),
    "rank_1_has_no_tokens": (chosen(5, 6), torch.zeros(0, SLOTS, dtype=torch.int64)),
    "one_token": (torch.tensor([[4]]), torch.tensor([[5]])),
}
EXPERT_CLASSES = {
    "mixtral": (MixtralExperts, MixtralConfig),
    "gpt_oss": (GptOssExperts, GptOssConfig),  # with biases, which make something of a row of zeros
}
LAYER_CASES = [
    *(
        (layout, routing, name, "mixtral")
        for layout in LAYOUTS
        for routing in ROUTING
        for name in ("eager", "moe_ext")
    ),
    *((layout, "unused", name, "mixtral") for layout in LAYOUTS for name in ("grouped_mm", "batched_mm")),
    *((layout, routing, "eager", "gpt_oss") for layout in LAYOUTS for routing in ("unused", "rank_0_gets_nothing")),
]


def whole_experts(family: str, implementation: str, dtype: torch.dtype) -> nn.Module:
    kind, config_class = EXPERT_CLASSES[family]
    config = config_class(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    config._experts_implementation = implementation
    experts = kind(config)
    generator = torch.Generator().manual_seed(7)
    for parameter in experts.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return experts.to(dtype)


def local_experts(experts: nn.Module, rank: int) -> nn.Module:
    """What Transformers makes of the experts of one rank."""
    part = copy.deepcopy(experts)
    for name, parameter in experts.named_parameters():
        setattr(part, name, nn.Parameter(parameter.detach().chunk(RANKS)[rank].clone()))
    part.num_experts, part._is_expert_parallel = EXPERTS // RANKS, True
    return part


def batch_of(index: Tensor, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights (NaN where a slot is not used), and factors that make a loss of the output."""
    generator = torch.Generator().manual_seed(seed)
    hidden, probe = torch.randn(2, len(index), HIDDEN, generator=generator, dtype=torch.float64).unbind(0)
    weights = torch.rand(index.shape, generator=generator, dtype=torch.float64) + 0.1
    weights = weights.masked_fill(index >= EXPERTS, math.nan)
    return hidden.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_(), probe.to(dtype)


@contextmanager
def watched() -> Iterator[list[int]]:
    """How many rows of width H each exchange sends. Buffers for what arrives are full of NaN."""
    counts, send, new_empty = [], expert_parallel._send, Tensor.new_empty

    def counting(rows: Tensor, *args: Any) -> Tensor:
        if rows.shape[1:] == (HIDDEN,) and rows.is_floating_point():
            counts.append(len(rows))
        return send(rows, *args)

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "_send", counting)
        patch.setattr(Tensor, "new_empty", poisoned)
        yield counts


def meshes(layout: str) -> tuple[Any, Any]:
    """Those of the expert-parallel and of the tensor-parallel group."""
    _, manager = initialize_distributed_mesh(DistributedConfig(ep_size=RANKS, **LAYOUTS[layout]))
    return manager.get_mesh("ep"), manager.get_mesh("tp")


def check(found: Tensor | None, expected: Tensor | None, dtype: torch.dtype, what: str) -> None:
    assert found is not None and expected is not None, f"{what}: a gradient is missing"
    error = relative_error(found, expected)
    assert error < LIMITS[dtype], f"{what}: {error}"


def gradient_of(leaf: Tensor) -> Tensor:
    """Autograd gives none where no slot is used."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def run_layer(layout: str, routing: str, implementation: str, family: str) -> None:
    rank, dtype = dist.get_rank(), torch.float32 if implementation == "grouped_mm" else torch.float64
    indices = ROUTING[routing] if layout == "different" else ROUTING[routing][:1]
    mine = rank if layout == "different" else 0
    batches = [batch_of(index, dtype, seed) for seed, index in enumerate(indices)]
    whole = whole_experts(family, implementation, dtype)
    part = local_experts(whole, rank)
    layer = EPImplementationInterface()["moe_ext"](part, *meshes(layout))
    assert isinstance(layer, expert_parallel.MoeExtEP)
    exact = copy.deepcopy(whole).double()
    expected = []
    for index, (hidden, weights, probe) in zip(indices, batches, strict=True):
        leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weights)]
        out = experts_reference(leaves[0], read_experts(exact), index, leaves[1])
        if out.requires_grad:  # some slot is used
            (out * probe).sum().backward()
        expected.append((out, *leaves))
    out, exact_hidden, exact_weights = expected[mine]
    hidden, weights, probe = batches[mine]
    index = indices[mine]

    with watched() as counts:
        with torch.no_grad():
            check(layer(hidden, index, weights), out, dtype, "without gradients")
        counts.clear()
        found = layer(hidden, index, weights)
        check(found, out, dtype, "output")
        sent = counts[0]  # before the way back
        assert torch.equal(layer(hidden, index, weights), found), "two runs differ"
        more = torch.full((len(index), 1), EXPERTS + 5)
        wider = layer(hidden, torch.cat([more, index], 1), torch.cat([more * math.nan, weights], 1))
        if implementation != "grouped_mm":
            assert torch.equal(wider, found), "unused slots change the output"
        (found * probe).sum().backward()
    check(hidden.grad, gradient_of(exact_hidden), dtype, "hidden.grad")
    check(weights.grad, gradient_of(exact_weights), dtype, "weights.grad")
    for name, parameter in part.named_parameters():
        check(parameter.grad, gradient_of(exact.get_parameter(name)).chunk(RANKS)[rank], dtype, name)

    owners = [{e // (EXPERTS // RANKS) for e in row if e < EXPERTS} for row in index.tolist()]
    if layout == "shared":  # each rank sends its half, of which the first is the longer one
        middle = -(-len(owners) // 2)
        owners = owners[middle:] if rank else owners[:middle]
    assert sent == sum(map(len, owners)), "rows sent"
    assert routing != "plain" or sent < len(owners) * SLOTS, "a row for each slot"


def run_frozen(layout: str) -> None:
    """Experts alone get gradients, where nothing before them is trained."""
    rank, index = dist.get_rank(), ROUTING["unused"][0]
    hidden, weights, probe = batch_of(index, torch.float64, 0)
    whole = whole_experts("mixtral", "eager", torch.float64)
    part = local_experts(whole, rank)
    layer = expert_parallel.MoeExtEP(part, *meshes(layout))
    (layer(hidden.detach(), index, weights.detach()) * probe).sum().backward()
    (experts_reference(hidden.detach(), read_experts(whole), index, weights.detach()) * probe).sum().backward()
    copies = 1 if layout == "shared" else RANKS  # both ranks hold the same batch here
    for name, parameter in part.named_parameters():
        check(parameter.grad, copies * whole.get_parameter(name).grad.chunk(RANKS)[rank], torch.float64, name)


def run_mixing(layout: str) -> None:
    """Experts that get mixtures of tokens: of each rank's own sequences."""
    rank, mine = dist.get_rank(), dist.get_rank() if layout == "different" else 0
    whole = whole_experts("mixtral", "eager", torch.float64)
    part = local_experts(whole, rank)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for sequences in (2, 1) if layout == "different" else (2,):
        logits, mixed = torch.randn(2, sequences, 5, 2 * EXPERTS, generator=generator, dtype=torch.float64)
        hidden, probe = torch.randn(2, 5 * sequences, HIDDEN, generator=generator, dtype=torch.float64)
        batches.append([*(tensor.requires_grad_() for tensor in (logits.softmax(1), mixed.softmax(2), hidden)), probe])

    def run(experts: nn.Module, call: Any, dispatch: Tensor, combine: Tensor, hidden: Tensor, probe: Tensor) -> Tensor:
        context = moe.RoutingContext(carry={(0, "dispatch"): dispatch, (0, "combine"): combine})
        experts.moe_link.slots.layer_context = context
        index = torch.zeros(len(hidden), 1, dtype=torch.int64)
        out = call(hidden, index, torch.ones(index.shape, dtype=torch.float64))
        (out * probe).sum().backward()
        return out

    for experts in (whole, part):
        link = RoutingLink()
        install(experts, RoutedExperts, moe_num_experts=EXPERTS, moe_link=link, moe_mixing_order=0)
    copies = [[tensor.detach().requires_grad_(tensor.requires_grad) for tensor in batch] for batch in batches]
    expected = [run(whole, whole, *batch) for batch in copies]
    found = run(part, expert_parallel.MoeExtEP(part, *meshes(layout)), *batches[mine])
    check(found, expected[mine], torch.float64, "output")
    for number in range(3):
        check(batches[mine][number].grad, copies[mine][number].grad, torch.float64, f"input {number}")
    for name, parameter in part.named_parameters():
        check(parameter.grad, whole.get_parameter(name).grad.chunk(RANKS)[rank], torch.float64, name)
    part.moe_exchange = None  # as with a stock implementation
    with pytest.raises(ValueError, match="mixtures of tokens"):
        run(part, part, *batches[mine])


# Models -------------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def top_p(threshold: float) -> moe.TopPRouterConfig:
    # A balance loss is not a sum over the batch: two halves are balanced one by one.
    return moe.TopPRouterConfig(threshold=threshold, max_slots=3, balance_coef=0.0, entropy_coef=0.0)


def extended(**declaration: Any) -> nn.Module:
    model = moe.extend(MODELS["mixtral"](), moe.MoeExtension(**declaration))
    for name, parameter in model.named_parameters():
        if "moe_" in name:  # those that start at zero would show nothing
            nn.init.normal_(parameter, std=0.3)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "top_p": lambda: extended(router=top_p(0.4)),
    "zero_experts": lambda: extended(
        router=top_p(0.5),
        zero_experts=moe.ZeroExpertsConfig(zero=1, copy=2, constant=1),
        shared_experts=moe.SharedExpertsConfig(intermediate_size=24),
    ),
    "rmoe": lambda: extended(router=moe.RMoERouterConfig(balance_coef=0.0, z_coef=0.1)),
    "upcycled": lambda: moe.upcycle(
        LlamaForCausalLM(LlamaConfig(**SIZES)), num_experts=4, check=False, router=top_p(0.4)
    ),
}
_PLAN = {"": "ep_dispatch_experts", ".gate_up_proj": "grouped_gemm", ".down_proj": "grouped_gemm"}
PLANS = {"upcycled": {f"model.layers.*.mlp.experts{name}": style for name, style in _PLAN.items()}}  # dense: none

MODEL_CASES = [
    *(("shared", name, "eager") for name in MODELS),
    *(("shared", name, "moe_ext") for name in ("mixtral", "top_p", "zero_experts")),
    *(("different", name, "moe_ext") for name in MODELS),
    *(("different", name, "grouped_mm") for name in ("qwen3_moe", "top_p", "zero_experts")),
]


def load(folder: Path, name: str, implementation: str, dtype: torch.dtype, **parallel: Any) -> Any:
    if parallel:
        settings = {"ep_size": RANKS, "ep_implementation": "moe_ext", "ep_plan": PLANS.get(name), **parallel}
        parallel = {"distributed_config": DistributedConfig(**settings)}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(
        folder / name, experts_implementation=implementation, dtype=dtype, **parallel
    )


def full(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def close(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Stock gates compute in float32, whatever the model's dtype: one bit there is what float64 could differ by."""
    check(found, expected, torch.float32, what)


def run_model(folder: Path, layout: str, name: str, implementation: str, checkpointing: bool = False) -> None:
    """Logits, all gradients and the weights after a step of SGD."""
    rank, shared = dist.get_rank(), layout == "shared"
    dtype = torch.float64 if shared else torch.float32  # in float64 FSDP of torch 2.13 halves gradients of experts
    model = load(folder, name, implementation, dtype, **LAYOUTS[layout])
    one = load(folder, name, implementation, dtype)
    ids = torch.randint(4, 64, (4, 8), generator=torch.Generator().manual_seed(3))
    rows = slice(None) if shared else slice(2 * rank, 2 * rank + 2)
    with torch.no_grad():
        close(full(model(ids[rows]).logits), one(ids[rows]).logits, "logits")
    if checkpointing:
        model.gradient_checkpointing_enable()
    for network, batch in ((model, ids[rows]), (one, ids)):
        network.train()
        network(batch, labels=batch).loss.backward()
    expected = dict(one.named_parameters())
    assert expected.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        close(full(parameter.grad), expected[key].grad, f"{key}.grad")
        torch.optim.SGD([parameter], lr=0.1).step()
        torch.optim.SGD([expected[key]], lr=0.1).step()
        close(full(parameter.detach()), expected[key].detach(), key)
    with torch.no_grad():
        close(full(model(ids[rows]).logits), one(ids[rows]).logits, "logits after a step")


def run_generate(folder: Path, name: str) -> None:
    models = (load(folder, name, "moe_ext", torch.float64, **size) for size in ({"tp_size": RANKS}, {}))
    ids = torch.randint(4, 64, (2, 5), generator=torch.Generator().manual_seed(3))
    assert torch.equal(*(model.generate(ids, max_new_tokens=6, do_sample=False) for model in models))


def run_save(folder: Path, layout: str) -> None:
    target = folder / f"saved_{layout}"
    load(folder, "zero_experts", "eager", torch.float32, **LAYOUTS[layout]).save_pretrained(target)
    dist.barrier()
    first, second = (load(folder, name, "eager", torch.float32).state_dict() for name in ("zero_experts", target.name))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def run_stock(folder: Path, name: str, stock: str, message: str | None) -> None:
    """What the implementations of Transformers do with ids of `num_experts` and above."""
    model = load(folder, name, "eager", torch.float64, tp_size=RANKS, ep_implementation=stock).train()
    ids = torch.randint(4, 64, (4, 8), generator=torch.Generator().manual_seed(3))
    if message is not None:
        with pytest.raises((RuntimeError, ValueError), match=message):
            model(ids)
        return
    close(full(model(ids).logits), load(folder, name, "eager", torch.float64)(ids).logits, "logits")


STOCK_CASES = {
    "all_to_all_refuses_unused_slots": ("top_p", "all_to_all", "out of bounds"),
    "auto_refuses_unused_slots": ("top_p", "auto", "out of bounds"),
    "all_reduce_takes_unused_slots": ("top_p", "all_reduce", None),
    "all_reduce_is_refused_copies": ("zero_experts", "all_reduce", 'ep_implementation="moe_ext"'),
}


# The program and its tests ------------------------------------------------------------------------------------------


def cases(kind: str, folder: Path) -> dict[str, Callable[[], None]]:
    if kind == "layers":
        layers = {"-".join(case): partial(run_layer, *case) for case in LAYER_CASES}
        layers |= {f"frozen-{layout}": partial(run_frozen, layout) for layout in LAYOUTS}
        return layers | {f"mixing-{layout}": partial(run_mixing, layout) for layout in LAYOUTS}
    models = {"-".join(case): partial(run_model, folder, *case) for case in MODEL_CASES}
    models["checkpointing"] = partial(run_model, folder, "different", "zero_experts", "eager", True)
    models["generate"] = partial(run_generate, folder, "zero_experts")
    models |= {f"save-{layout}": partial(run_save, folder, layout) for layout in LAYOUTS}
    return models | {name: partial(run_stock, folder, *case) for name, case in STOCK_CASES.items()}


LAYER_NAMES, MODEL_NAMES = (list(cases(kind, Path())) for kind in ("layers", "models"))


def program(kind: str, folder: Path) -> None:
    # One rank that fails leaves the other waiting.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    runs = cases(kind, folder)
    problems = dict.fromkeys(runs, "not reached: the process ended before")
    for name, run in runs.items():
        try:
            run()
            del problems[name]
        except (Exception, pytest.fail.Exception):
            problems[name] = traceback.format_exc()
        (folder / f"{kind}_{dist.get_rank()}.json").write_text(json.dumps(problems))
    dist.destroy_process_group()


def launch(kind: str, folder: Path) -> list[dict[str, str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_MOE_EXT_CPU_MATMUL"] = "rows"  # nothing is chosen by the clock, so that two runs can be equal
    options = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, "-m", *options, __file__, kind, str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}_*.json"))]
    assert done.returncode == 0 or any(found), done.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launch("layers", tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
    return launch("models", folder)


@pytest.mark.multi_process
@pytest.mark.parametrize("name", LAYER_NAMES)
def test_layer(layers, name):
    assert not any(name in problems for problems in layers), "\n".join(rank.get(name, "") for rank in layers)


@pytest.mark.multi_process
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_model(models, name):
    assert not any(name in problems for problems in models), "\n".join(rank.get(name, "") for rank in models)


REGISTERED = """
import sys, hf_moe_ext
from transformers.distributed.expert_parallel import EPImplementationInterface
print("moe_ext" in EPImplementationInterface(), "hf_moe_ext.expert_parallel" in sys.modules)
"""
OLD_TRANSFORMERS = """
import transformers.distributed.expert_parallel as stock
del stock.EPImplementationInterface, stock.AllReduceEP
import hf_moe_ext
try:
    import hf_moe_ext.expert_parallel
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("code", "output"),
    [
        pytest.param(REGISTERED, "True False", id="registered_without_the_module_that_does_the_work"),
        pytest.param(OLD_TRANSFORMERS, "expert parallelism needs transformers 5.23 or later.", id="old_transformers"),
    ],
)
def test_import(code, output):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == output, done.stderr


if __name__ == "__main__":
    program(sys.argv[1], Path(sys.argv[2]))
