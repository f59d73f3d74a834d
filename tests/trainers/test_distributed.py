"""`MoETrainer` on 2 and 4 processes of a CPU against one process with the same batches: every way of splitting models,
checkpoints that go on with another number of processes, and layouts that are refused.

pytest starts this file as a program; it trains, and writes what came out, or what was raised. The tests compare.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.trainers.model_flops import ModelFlops

from .common import arguments, rows, stock_mixtral, tiny_moe


try:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import EPImplementationInterface as _  # noqa: F401
except ImportError:
    pytest.skip("transformers has no interface for expert parallelism before 5.23", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4
# Equal lengths: then the token means of z-loss and entropy do not depend on who has which rows.
EVEN = [9] * 24
UNEVEN = [9, 5, 7, 3, 9, 9, 2, 8, 6, 9, 4, 4] * 2
CLOCK = ("moe/step_time", "moe/tokens_per_second", "moe/model_tflops")

# One step of SGD moves a weight by its gradient; AdamW has a state to save, and an epsilon that no rounding reaches.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0, "max_steps": 3}
ADAM = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0, "max_steps": 4}
SAVING = {**ADAM, "save_strategy": "steps", "save_steps": 1, "logging_steps": 3, "lr_scheduler_type": "linear"}


# Models -------------------------------------------------------------------------------------------------------------


def qwen3_moe() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, initializer_range=0.1))


MEANS = {"z_coef": 0.1, "entropy_coef": 0.1}
MODELS = {
    "mixtral": lambda: tiny_moe(moe.TopKRouterConfig(**MEANS), num_local_experts=4),
    "qwen3_moe": lambda: moe.extend(qwen3_moe(), moe.MoeExtension(router=moe.TopKRouterConfig(**MEANS))),
    # Loss-free balancing, and a module of our own beside the experts.
    "deepseek_moe": lambda: moe.extend(
        stock_mixtral(num_local_experts=4),
        moe.MoeExtension(
            router=moe.DeepSeekMoERouterConfig(
                expert_balance_coef=0.0, z_coef=0.1, correction_bias=True, bias_update_rate=0.05
            ),
            shared_experts=moe.SharedExpertsConfig(intermediate_size=16),
        ),
    ),
    # Unused slots.
    "top_p": lambda: tiny_moe(num_local_experts=4),
    "stock": lambda: stock_mixtral(num_local_experts=4),
}


def layout(mode: str, world: int) -> dict[str, Any]:
    sizes = {
        "fsdp": {"fsdp_size": world},
        "ep": {"fsdp_size": world, "ep_size": world, "ep_implementation": "moe_ext"},
        "all_to_all": {"fsdp_size": world, "ep_size": world, "ep_implementation": "all_to_all"},
        "fsdp_ep": {"fsdp_size": world, "ep_size": 2, "ep_implementation": "moe_ext"},
        "tp_ep": {"tp_size": world, "ep_size": world, "ep_implementation": "moe_ext"},
    }
    return {"distributed_config": DistributedConfig(**sizes[mode])} if mode in sizes else {}


# The program --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fsdp_of_accelerate_on_cpus() -> Iterator[None]:
    """accelerate takes `fsdp` up on GPUs only; what follows works on CPUs as well."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train one case; what the main process writes down."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    mode, kind = case["mode"], case["kind"]
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate leaves it behind
    model = AutoModelForCausalLM.from_pretrained(folder / kind, **layout(mode, world))
    if kind == "stock":
        model = moe.extend(model, moe.MoeExtension(router=moe.TopKRouterConfig(**MEANS)))
    options = dict(case["options"])
    if mode in ("plugin", "plugin_left_out"):
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    target = folder / case["name"]
    size = BATCH // world
    args = arguments(target, per_device_train_batch_size=size, per_device_eval_batch_size=size, **options)
    with fsdp_of_accelerate_on_cpus() if mode == "plugin" else contextlib.nullcontext():
        data, others = rows(case.get("lengths", EVEN)), rows(EVEN[:8], seed=1)
        trainer = moe.MoETrainer(model=model, args=args, train_dataset=data, eval_dataset=others)
        trainer.train(resume_from_checkpoint=str(folder / case["resume"]) if "resume" in case else None)
        evaluation = trainer.evaluate()["eval_loss"]
    flops = ModelFlops(trainer.model)
    state = trainer.model.state_dict()
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    if trainer.is_world_process_zero():
        torch.save({name: value.clone() for name, value in whole.items()}, target / "weights.pt")
    return {
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "eval_loss": evaluation,
        "flops": [flops.fixed, *flops.experts.values()],
        "trained": trainer.parameter_report().trained,
    }


def program(folder: Path, cases: list[dict[str, Any]]) -> None:
    # One rank that fails leaves the others waiting.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for case in cases:
        (folder / case["name"]).mkdir(parents=True, exist_ok=True)
        try:
            found = run(folder, case)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        if dist.get_rank() == 0:
            (folder / case["name"] / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def launch(folder: Path, processes: int, cases: list[dict[str, Any]]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_MOE_EXT_CPU_MATMUL"] = "rows"
    options = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *options, "tests.trainers.test_distributed", str(folder), json.dumps(cases)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def found_of(folder: Path, name: str) -> dict[str, Any]:
    found = json.loads((folder / name / "found.json").read_text())
    assert "error" not in found, found["trace"]
    return found


def reference(folder: Path, case: dict[str, Any]) -> str:
    """The same training in this process; the name of its folder."""
    options = json.dumps([case["kind"], case["options"], case.get("lengths")], sort_keys=True)
    name = f"one-{abs(hash(options))}"
    if not (folder / name).is_dir():
        found = run(folder, {**case, "mode": "one", "name": name})
        (folder / name / "found.json").write_text(json.dumps(found))
    return name


def assert_same_training(folder: Path, name: str, expected: str) -> None:
    """Losses, metrics, gradient norms, evaluation and weights."""
    found, wanted = found_of(folder, name), found_of(folder, expected)
    assert len(found["log"]) == len(wanted["log"])
    for line, other in zip(found["log"], wanted["log"], strict=True):
        keys = [key for key in other if key not in CLOCK]
        assert {key: line[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, rel=1e-5, abs=1e-7)
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
    assert found["flops"] == wanted["flops"] and found["trained"] == wanted["trained"]
    weights, others = (torch.load(folder / run_name / "weights.pt") for run_name in (name, expected))
    assert weights.keys() == others.keys()
    for key, value in others.items():
        torch.testing.assert_close(
            weights[key], value, atol=2e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
    return folder


# Two processes ------------------------------------------------------------------------------------------------------

MATRIX = [
    *(("ddp", kind, {}) for kind in ("mixtral", "deepseek_moe")),
    *((mode, kind, {}) for mode in ("fsdp", "ep", "plugin") for kind in ("mixtral", "qwen3_moe", "deepseek_moe")),
    ("all_to_all", "mixtral", {}),
    ("ep", "stock", {}),
    ("fsdp", "top_p", {"lengths": UNEVEN}),
    ("ep", "top_p", {"lengths": UNEVEN}),
    ("ep", "mixtral", {"options": {**SGD, "gradient_accumulation_steps": 2}}),
    ("fsdp", "deepseek_moe", {"options": {**SGD, "gradient_accumulation_steps": 2}}),
    ("ep", "top_p", {"lengths": UNEVEN, "options": {**SGD, "gradient_accumulation_steps": 2}}),
]
SAVES = [(mode, kind) for mode, kind in (("ddp", "mixtral"), ("fsdp", "qwen3_moe"), ("ep", "deepseek_moe"))]
REFUSED = {
    "tp_ep": ("mixtral", SGD, "which accelerate does not train on CPUs"),
    "plugin_left_out": ("mixtral", SGD, "accelerate does not shard on this device"),
    "all_to_all": ("top_p", SGD, "needs every slot of a token to be used, and the routers"),
    "fsdp": ("mixtral", {**SGD, "train_experts": [0]}, "`train_experts` works on whole tensors"),
}


def matrix_case(number: int) -> dict[str, Any]:
    mode, kind, more = MATRIX[number]
    return {"name": f"two-{number}", "mode": mode, "kind": kind, "options": SGD, **more}


def save_case(mode: str, kind: str, processes: int) -> dict[str, Any]:
    return {"name": f"saves-{processes}-{mode}-{kind}", "mode": mode, "kind": kind, "options": SAVING}


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    cases = [matrix_case(number) for number in range(len(MATRIX))]
    cases += [save_case(mode, kind, 2) for mode, kind in SAVES]
    cases += [
        {**save_case(mode, kind, 2), "name": f"resumes-{mode}", "resume": f"saves-2-{mode}-{kind}/checkpoint-2"}
        for mode, kind in SAVES
    ]
    cases += [
        {"name": f"refused-{mode}", "mode": mode, "kind": kind, "options": options}
        for mode, (kind, options, _) in REFUSED.items()
    ]
    # Of one process, whose optimizer numbers its state.
    whole = reference(folder, save_case("fsdp", "qwen3_moe", 2))
    cases += [{**save_case("fsdp", "qwen3_moe", 2), "name": "from-one", "resume": f"{whole}/checkpoint-2"}]
    launch(folder, 2, cases)
    return folder


@pytest.mark.multi_process
@pytest.mark.parametrize("number", range(len(MATRIX)), ids=lambda n: "-".join(MATRIX[n][:2]) + f"-{n}")
def test_two_processes_train_as_one(two, number):
    case = matrix_case(number)
    assert_same_training(two, case["name"], reference(two, case))


@pytest.mark.multi_process
@pytest.mark.parametrize("mode", REFUSED)
def test_refused_before_training(two, mode):
    found = json.loads((two / f"refused-{mode}" / "found.json").read_text())
    assert found.get("error", "").startswith("ValueError") and REFUSED[mode][2] in found["error"], found
    assert not (two / f"refused-{mode}" / "routing_history.jsonl").exists()


@pytest.mark.multi_process
@pytest.mark.parametrize(("mode", "kind"), SAVES)
def test_two_processes_save_and_resume(two, mode, kind):
    """A checkpoint between two logs; the resumed run is the whole one, and both are that of one process."""
    case = save_case(mode, kind, 2)
    expected = reference(two, case)
    for name in (case["name"], f"resumes-{mode}"):
        assert_same_training(two, name, expected)
    files = {path.name for path in (two / case["name"] / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "trainer_state.json"} <= files
    assert ("optimizer.pt" in files) == (mode == "ddp")


@pytest.mark.multi_process
@pytest.mark.parametrize(("mode", "kind"), SAVES)
def test_one_process_goes_on(two, mode, kind):
    """The checkpoint of two processes loads as a model, and a single process resumes it."""
    case = save_case(mode, kind, 2)
    checkpoint = f"{case['name']}/checkpoint-2"
    alone = {**case, "name": f"alone-{mode}", "mode": "one", "resume": checkpoint}
    found = run(two, alone)
    (two / alone["name"] / "found.json").write_text(json.dumps(found))
    assert_same_training(two, alone["name"], reference(two, case))

    model = AutoModelForCausalLM.from_pretrained(two / case["name"] / "checkpoint-4").eval()
    weights = torch.load(two / case["name"] / "weights.pt")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.multi_process
def test_checkpoints_of_one_process_are_not_split(two):
    found = json.loads((two / "from-one" / "found.json").read_text())
    assert "of a model that was not split" in found.get("error", ""), found


# Four processes -----------------------------------------------------------------------------------------------------

FOUR = [
    ("fsdp_ep", "mixtral"),
    ("fsdp_ep", "deepseek_moe"),
    ("ep", "qwen3_moe"),
    ("fsdp", "mixtral"),
    ("ddp", "mixtral"),
]


@pytest.fixture(scope="module")
def four(folder: Path) -> Path:
    launch(folder, 4, [save_case(mode, kind, 4) for mode, kind in FOUR])
    return folder


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("mode", "kind"), FOUR)
def test_four_processes_train_as_one(four, mode, kind):
    case = save_case(mode, kind, 4)
    assert_same_training(four, case["name"], reference(four, case))


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_moe"])
def test_from_four_processes_to_two_to_one(four, kind):
    """Each goes on with another split: FSDP2 with pairs of experts, expert parallelism alone, a whole model."""
    first = save_case("fsdp_ep", kind, 4)
    expected = reference(four, first)
    second = {**first, "name": f"down-2-{kind}", "mode": "ep", "resume": f"{first['name']}/checkpoint-1"}
    launch(four, 2, [second])
    assert_same_training(four, second["name"], expected)
    third = {**first, "name": f"down-1-{kind}", "mode": "one", "resume": f"{second['name']}/checkpoint-3"}
    (four / third["name"]).mkdir()
    (four / third["name"] / "found.json").write_text(json.dumps(run(four, third)))
    assert_same_training(four, third["name"], expected)


if __name__ == "__main__":
    program(Path(sys.argv[1]), json.loads(sys.argv[2]))
