"""What is to train moves, what is frozen stays bit-equal."""

from __future__ import annotations

import pytest
import torch

import hf_moe_ext as moe
from hf_moe_ext import MoETrainer, TopKRouterConfig, TopPRouterConfig, trace_routing
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.trainers import freeze_router, train_experts, train_only_moe
from hf_moe_ext.trainers.freezing import attention_parts, moe_parts
from hf_moe_ext.trainers.parameter_report import ParameterReport

from ..modeling.test_attention_bam import llama
from ..modeling.test_monet import make as make_monet
from ..tiny_models import tiny_model
from .common import NUM_EXPERTS, arguments, rows, snapshot, stock_mixtral, tiny_moe, train


DATA = rows([9, 7, 9, 5, 9, 9, 6, 9])
ROUTER = TopKRouterConfig(balance_coef=0.01)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, bool]:
    return {name: not torch.equal(before[name], after[name]) for name in before}


@pytest.mark.parametrize("router", [ROUTER, TopPRouterConfig(threshold=0.5)], ids=["top_k", "top_p"])
def test_everything_moves_without_options(tmp_path, router):
    model = tiny_moe(router)
    before = snapshot(model)
    with trace_routing(model) as contexts:
        train(model, DATA, tmp_path, max_steps=3)

    changed = moved(before, snapshot(model))
    assert all(changed.values()), changed
    for key in ("0", "1"):
        used = {e for c in contexts for e in c.records[key].index.unique().tolist() if e < NUM_EXPERTS}
        name = f"model.layers.{key}.mlp.experts.down_proj"
        moved_experts = (before[name] != model.state_dict()[name]).flatten(1).any(1)
        assert all(moved_experts[expert] for expert in used)


def test_freeze_router_freezes_weights_and_bias(tmp_path):
    model = tiny_moe(TopKRouterConfig(balance_coef=0.1, correction_bias=True, bias_update_rate=0.1))
    before = snapshot(model)
    train(model, DATA, tmp_path, max_steps=3, freeze_router=True, weight_decay=0.1)

    for name, changed in moved(before, snapshot(model)).items():
        assert changed == (".gate." not in name), name


def test_train_only_moe(tmp_path):
    model = tiny_moe(ROUTER)
    before = snapshot(model)
    train(model, DATA, tmp_path, max_steps=2, train_only_moe=True)

    for name, changed in moved(before, snapshot(model)).items():
        assert changed == (".mlp." in name), name


OPTIMIZERS = {
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "sgd": {"learning_rate": 0.1},
    "adafactor": {"weight_decay": 0},
}


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
def test_only_the_named_experts_move(tmp_path, optim):
    model = tiny_moe(ROUTER)
    before = snapshot(model)
    options = {"weight_decay": 0.3, "optim": optim} | OPTIMIZERS[optim]
    train(model, DATA, tmp_path, max_steps=4, train_experts=[1, 4], **options)

    after = snapshot(model)
    for name in before:
        if ".experts." in name:
            changed = (before[name] != after[name]).flatten(1).any(1)
            assert changed.tolist() == [expert in (1, 4) for expert in range(NUM_EXPERTS)], name
        else:
            assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_trained_experts_decay_as_without_a_mask(tmp_path, optim):
    """With every other parameter frozen, expert 1 alone gives the same weights whether or not others train."""
    options = {"weight_decay": 0.3, "optim": optim, "max_grad_norm": 0.0, "freeze_router": True}
    results = []
    for ids in ([1], list(range(NUM_EXPERTS))):
        model = tiny_moe(TopKRouterConfig())
        model.requires_grad_(False)
        for layer in model.model.layers[1:]:
            layer.mlp.experts.requires_grad_(True)
        train(model, DATA, tmp_path / str(len(ids)), max_steps=1, train_experts=ids, **options)
        results.append(model.model.layers[1].mlp.experts.down_proj[1])

    assert torch.equal(*results)


def test_mask_clears_the_momentum_an_optimizer_already_has():
    model = tiny_moe(ROUTER)
    batch = {name: torch.stack([row[name] for row in DATA]) for name in DATA[0]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    step()
    mask = train_experts(model, [0])
    mask.attach(optimizer)
    before = snapshot(model)
    step()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    changed = (before[name] != model.state_dict()[name]).flatten(1).any(1)
    assert changed.tolist() == [True] + [False] * (NUM_EXPERTS - 1)

    mask.remove()
    step()
    assert (before[name] != model.state_dict()[name]).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "switch_transformers"])
def test_functions_work_on_stock_models(name):
    if get_family(name) is None:
        pytest.skip("this transformers has no supported version of the architecture")
    model = tiny_model(name)
    freeze_router(model)
    mask = train_experts(model, [0, 2])

    parts = moe_parts(model)
    assert parts and mask.trained == {part.key: (0, 2) for part in parts}
    assert not any(p.requires_grad for part in parts for p in part.router.parameters())
    total = sum(p.numel() for part in parts for p in part.experts.parameters())
    trained = sum(p.numel() for part in parts for p in part.experts.parameters() if p.requires_grad)
    assert (trained - mask.num_masked()) * parts[0].num_experts == total * 2


def test_training_twice_decays_once_per_step(tmp_path):
    """A second `train` keeps the optimizer. A weight whose gradient is zero only decays."""
    model = tiny_moe(TopKRouterConfig())
    weight = model.model.layers[1].mlp.experts.down_proj
    before = weight.detach().clone()
    weight.register_hook(torch.zeros_like)
    options = {"learning_rate": 0.5, "weight_decay": 0.2, "freeze_router": True}
    trainer = train(model, DATA, tmp_path, train_experts=[4, 5], **options)
    trainer.train()

    torch.testing.assert_close(weight[4:], before[4:] * 0.9**2)


def names_trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_functions_work_on_monet():
    """Groups of layers share a router, and no expert has weights of its own."""
    model = make_monet()
    parts = moe_parts(model)
    assert [part.key for part in parts] == ["0", "1", "2"] and [part.num_experts for part in parts] == [36] * 3
    assert parts[0].router is parts[1].router is not parts[2].router
    everything = names_trained(model)
    freeze_router(model)
    frozen = everything - names_trained(model)
    assert len(frozen) == 2 * 2 and all(".router.w" in name for name in frozen)
    report = ParameterReport.of(model)
    assert report.routers == () and report.num_experts == {"0": 36, "1": 36, "2": 36}
    assert "Experts trained: all of 36" in str(report)

    model = make_monet()
    train_only_moe(model)
    assert names_trained(model) == {name for name in everything if ".moe." in name or ".router." in name}
    with pytest.raises(ValueError, match='how layer "0" stores its experts'):
        train_experts(model, [3])


def test_monet_trains_with_frozen_routers(tmp_path):
    model = make_monet()
    before = snapshot(model)
    train(model, DATA, tmp_path, max_steps=2, freeze_router=True, weight_decay=0.1)
    for name, changed in moved(before, snapshot(model)).items():
        assert changed == (".router.w" not in name), name


@pytest.mark.parametrize("name", ["bam", "jetmoe"])
def test_attention_experts_and_their_routers(name):
    """They are routers and experts as those of the feed-forward blocks are."""
    model = tiny_model("jetmoe") if name == "jetmoe" else moe.upcycle([llama(0), llama(1)], method="bam")
    router, inside = (".moe_gate.", ".self_attn.") if name == "bam" else (".self_attention.experts.router.", None)
    everything = names_trained(model)
    assert sum(router in each for each in everything) == len(attention_parts(model)) == model.config.num_hidden_layers
    freeze_router(model)
    frozen = everything - names_trained(model)
    gates = ".mlp.gate." if name == "bam" else ".mlp.router."
    assert frozen == {each for each in everything if router in each or gates in each}
    model.requires_grad_(True)
    train_only_moe(model)
    kept = names_trained(model)
    if inside is not None:
        assert kept == {each for each in everything if inside in each or ".mlp." in each}
    else:  # keys and values are no experts
        assert {each for each in kept if ".self_attention." in each} == {
            each for each in everything if ".self_attention.experts." in each and not each.endswith("experts.bias")
        }


def test_functions_refuse_dense_models():
    with pytest.raises(ValueError, match="no routers"):
        freeze_router(tiny_model("llama"))
    with pytest.raises(ValueError, match="no routers"):
        train_experts(tiny_model("llama"), [0])


def test_weight_decay_of_an_unknown_optimizer_is_refused():
    model = stock_mixtral()
    mask = train_experts(model, [0])
    with pytest.raises(ValueError, match="Adamax"):
        mask.attach(torch.optim.Adamax(model.parameters(), weight_decay=0.1))


def test_report_counts_parameters(tmp_path):
    model = tiny_moe(ROUTER)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    trainer = MoETrainer(model=model, args=arguments(tmp_path, train_experts=[0, 5], freeze_router=True))

    report = trainer.parameter_report()
    routers = sum(p.numel() for n, p in model.named_parameters() if ".gate." in n)
    assert report.trained == total - routers - experts * 4 // NUM_EXPERTS
    assert report.trained + report.frozen == total
    assert report.experts == {"0": (0, 5), "1": (0, 5)}
    assert "0, 5 of 6" in str(report)
