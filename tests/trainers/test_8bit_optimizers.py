"""Optimizers whose state is in 8 bits: fused experts, frozen experts, decay, and resuming."""

from __future__ import annotations

import pytest
import torch

from hf_moe_ext import TopKRouterConfig
from hf_moe_ext.trainers.freezing import train_experts, train_rows

from .common import rows, snapshot, tiny_moe, train


bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.46.1", reason="bitsandbytes is not installed")


def _runs_on_cpu() -> bool:
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    parameter.grad = torch.ones(64, 64)
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=0.1)
    try:
        optimizer.step()
    except (NotImplementedError, RuntimeError, AttributeError):
        return False
    return bool((parameter < 1).all()) and optimizer.state[parameter]["state1"].dtype == torch.uint8


pytestmark = [
    pytest.mark.skipif(not _runs_on_cpu(), reason="this bitsandbytes has no 8-bit optimizers on a CPU"),
    pytest.mark.filterwarnings("ignore:Paged optimizers"),
]


@pytest.fixture(autouse=True)
def no_overrides():
    """bitsandbytes remembers settings of parameters, by their place, for the whole process."""
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


OPTIMIZERS = ("adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit")
DATA = rows([9] * 8)


def make(width=32):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return tiny_moe(TopKRouterConfig(balance_coef=0.1), hidden_size=width, intermediate_size=40, **heads)


def state_of(trainer, parameter):
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return optimizer.state[parameter]


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_frozen_experts_stay_equal_and_the_others_train(tmp_path, optim, decay):
    model = make()  # experts of 2 * 40 * 32 and 32 * 40 numbers, which are whole blocks of 256
    before = snapshot(model)
    options = {"optim": optim, "max_steps": 4, "weight_decay": decay, "train_experts": [1, 4]}
    trainer = train(model, DATA, tmp_path, **options)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            tensor = getattr(experts, name)
            key = next(key for key, value in model.named_parameters() if value is tensor)
            assert state_of(trainer, tensor)["state1"].dtype == torch.uint8
            for expert in range(6):
                equal = torch.equal(tensor[expert], before[key][expert])
                assert equal == (expert not in (1, 4)), (key, expert)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_decay_of_the_trained_experts_is_the_optimizers_own(tmp_path, optim):
    """With a learning rate this small, and no gradient to speak of, the first step is decay alone."""
    found = []
    for mask in (None, [1, 4]):
        torch.manual_seed(0)
        model = torch.nn.Linear(256, 64, bias=False)
        optimizer = bitsandbytes.optim.__dict__[_CLASSES[optim]](
            [{"params": [model.weight], "weight_decay": 0.5}], lr=1e-2, optim_bits=8
        )
        if mask is not None:
            train_rows(model, {model.weight: mask}).attach(optimizer)
        model.weight.sum().backward()
        optimizer.step()
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(found[1][[1, 4]], found[0][[1, 4]], atol=1e-4, rtol=1e-3)
    torch.manual_seed(0)
    assert torch.equal(found[1][[0, 2, 3]], torch.nn.Linear(256, 64, bias=False).weight[[0, 2, 3]])


_CLASSES = {
    "adamw_bnb_8bit": "AdamW",
    "paged_adamw_8bit": "AdamW",
    "lion_8bit": "Lion",
    "ademamix_8bit": "AdEMAMix",
    "rmsprop_bnb_8bit": "RMSprop",
}


def test_adam_of_bitsandbytes_decays_the_weight(tmp_path):
    """Unlike that of PyTorch, whose decay goes through the gradient."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 64, bias=False)
    before = model.weight.detach().clone()
    optimizer = bitsandbytes.optim.Adam8bit([{"params": [model.weight], "weight_decay": 0.5}], lr=1e-2)
    train_rows(model, {model.weight: [2]}).attach(optimizer)
    (model.weight * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight[2], before[2] * (1 - 1e-2 * 0.5))
    assert torch.equal(model.weight[3], before[3])


@pytest.mark.parametrize("name", ["AdamW", "Lion", "AdEMAMix", "RMSprop"])
def test_a_state_from_before_is_cleared(name):
    """Momentum of experts that are frozen later would go on moving them; code 0 is not the number 0."""
    model = make()
    optimizer = getattr(bitsandbytes.optim, name)(model.parameters(), lr=1e-2, optim_bits=8, weight_decay=0.0)
    ids = torch.stack([row["input_ids"] for row in DATA])
    for _ in range(3):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = train_experts(model, [0])
    mask.attach(optimizer)
    before = snapshot(model)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, tensor in model.state_dict().items():
        if "experts" in key:
            assert torch.equal(tensor[1:], before[key][1:]), key
            assert not torch.equal(tensor[0], before[key][0]), key


def test_fused_experts_are_updated_as_single_matrices():
    """One tensor of all experts, or one for each: the same numbers, where blocks of 256 belong to one expert."""
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(4, 128, 32))
    single = [torch.nn.Parameter(expert.clone()) for expert in stacked.detach()]
    first = bitsandbytes.optim.AdamW8bit([stacked], lr=1e-2, weight_decay=0.1)
    second = bitsandbytes.optim.AdamW8bit(single, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(4, 128, 32)
        stacked.grad = gradient.clone()
        for parameter, part in zip(single, gradient, strict=True):
            parameter.grad = part.clone()
        first.step()
        second.step()
    assert torch.equal(stacked.detach(), torch.stack([parameter.detach() for parameter in single]))
    assert first.state[stacked]["state1"].dtype == second.state[single[0]]["state1"].dtype == torch.uint8


def test_it_trains_like_the_optimizer_in_32_bits(tmp_path):
    eight = train(make(), DATA, tmp_path / "a", optim="adamw_bnb_8bit", max_steps=8, learning_rate=3e-3)
    plain = train(make(), DATA, tmp_path / "b", optim="adamw_torch", max_steps=8, learning_rate=3e-3)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (eight, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0]
    one, other = (t.model.model.layers[0].mlp.experts.gate_up_proj for t in (eight, plain))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "ademamix_8bit"])
@pytest.mark.parametrize("experts", [None, [0, 3]])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optim, experts):
    from hf_moe_ext import MoETrainer

    from .common import arguments

    def trainer(folder):
        options = {"optim": optim, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
        args = arguments(folder, train_experts=experts, **options)
        return MoETrainer(model=make(), args=args, train_dataset=DATA)

    whole = trainer(tmp_path / "a")
    whole.train()
    trainer(tmp_path / "b").train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (key, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    one = whole.model.model.layers[1].mlp.experts.down_proj
    other = resumed.model.model.layers[1].mlp.experts.down_proj
    first, second = state_of(whole, one), state_of(resumed, other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        equal = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert equal, name


def test_what_cannot_be_exact_is_refused():
    """An optimizer that scales a whole tensor by its norm has no elementwise rule."""
    model = make()
    mask = train_experts(model, [0])
    optimizer = bitsandbytes.optim.LAMB8bit(model.parameters(), lr=1e-2, weight_decay=0.1)
    with pytest.raises(ValueError, match="`train_experts` with weight decay is not supported for LAMB8bit"):
        mask.attach(optimizer)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_blocks_of_trained_and_frozen_experts_are_refused(tmp_path, optim):
    """Experts of 2 * 40 * 24 numbers are 7.5 blocks; zeros in the half that two share would be rounded."""
    with pytest.raises(ValueError, match="keeps its state in blocks of 256 numbers, and the trained experts of"):
        train(make(24), DATA, tmp_path / "a", optim=optim, max_steps=1, train_experts=[1])
    model = make(24)  # the fifth expert begins with a block
    before = snapshot(model)
    train(model, DATA, tmp_path / "b", optim=optim, max_steps=3, train_experts=[4, 5])
    for key, tensor in model.state_dict().items():
        if "experts" in key:
            assert [torch.equal(one, other) for one, other in zip(tensor, before[key], strict=True)] == [
                number not in (4, 5) for number in range(6)
            ]


def test_small_tensors_and_32_bits_have_no_blocks():
    parameter = torch.nn.Parameter(torch.ones(6, 300))  # too small to be in 8 bits
    model = torch.nn.ParameterList([parameter])
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], weight_decay=0.0)
    mask = train_rows(model, {parameter: [1]})
    mask.attach(optimizer)
    large = torch.nn.Parameter(torch.ones(60, 300))
    optimizer = bitsandbytes.optim.AdamW([large], weight_decay=0.0)
    train_rows(torch.nn.ParameterList([large]), {large: [1]}).attach(optimizer)
