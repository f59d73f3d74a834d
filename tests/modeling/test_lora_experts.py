"""LoRA experts against loops over folded weights: presets, routing, gradients, saving, bad input."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, DynamicCache

from hf_moe_ext.modeling.configuration_moe_ext import LoraExpertsConfig, MoeExtension
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_lora import LoraLinear, LoraStack, SharedBaseFfn, dense_gates
from hf_moe_ext.modeling.moe_losses import localized_balancing_loss
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, iter_routers, route_rows, trace_routing
from hf_moe_ext.patching import describe, extend, restore


# The name that transformers 5.17 needs.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PRESETS = {
    "mix_lora": {"preset": "mix_lora", "num_lora_experts": 4, "r": 3},
    "lora_moe": {"preset": "lora_moe", "num_lora_experts": 4, "lora_dropout": 0.0},
    "mola": {"preset": "mola", "num_lora_experts": [2, 3, 4]},
    "block": {"num_lora_experts": 3, "route_per": "block", "target_modules": ["ffn", "attention"], "use_rslora": True},
    "one": {"num_lora_experts": 1, "target_modules": ["q_proj", "down_proj"]},
    "ranks": {"adapters": [{"name": "a", "r": 2}, {"name": "b", "r": 5, "lora_alpha": 3.0}], "num_experts_per_tok": 1},
}


@torch.no_grad()
def randomize(model, seed=0, scale=0.3):
    """Give B and the gates values that count."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraStack):
            used = torch.arange(module.B.shape[1]) < torch.tensor(module.ranks)[:, None]
            module.B.copy_(scale * torch.randn(module.B.shape, generator=generator) * used[..., None])
    for router in iter_routers(model):
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    return model


def made(lora, name="llama", **options):
    model = tiny_model(name, **options)
    return randomize(extend(model, MoeExtension(lora_experts=lora)))


@torch.no_grad()
def logits(model, name="llama", **options):
    return model(**tiny_inputs(name), **options).logits


def first_row(model, **options):
    return model(input_ids=tiny_inputs("llama")["input_ids"][:1], **options)


# --- the start ---


@pytest.mark.parametrize("preset", PRESETS)
def test_the_start_is_the_stock_model(preset):
    model = tiny_model("llama")
    before, keys = logits(model), list(model.state_dict())
    extend(model, {"lora_experts": PRESETS[preset]})
    torch.testing.assert_close(logits(model), before, **CLOSE)
    randomize(model)
    assert (logits(model) - before).abs().max() > 0.1
    restore(model)
    assert torch.equal(logits(model), before) and list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


FAMILIES = {
    "gpt2": ["ffn"],  # Conv1D
    "qwen2": ["ffn", "attention"],  # biases
    "gpt_neox": ["ffn", "attention"],  # one projection for queries, keys and values
    "phi3": ["ffn"],  # gate and up in one
    "opt": ["ffn", "attention"],
    "mixtral": ["attention"],
    "qwen2_moe": ["ffn"],  # shared experts
    "bert": ["ffn"],
}


@pytest.mark.parametrize("route_per", ["linear", "block"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, route_per):
    if name == "qwen2_moe" and route_per == "block":
        pytest.skip("its shared experts see tokens in another shape; the next test has it")
    model = tiny_model(name)
    before = model(**tiny_inputs(name))[0].detach()
    extend(
        model,
        {
            "lora_experts": {
                "num_lora_experts": 3,
                "target_modules": FAMILIES[name],
                "num_experts_per_tok": 2,
                "route_per": route_per,
            }
        },
    )
    torch.testing.assert_close(model(**tiny_inputs(name))[0], before, **CLOSE)
    randomize(model)
    with trace_routing(model) as contexts:
        after = model(**tiny_inputs(name))[0]
    assert (after - before).abs().max() > 1e-2
    assert contexts[0].inner["lora"].records and all(
        key.startswith("lora.") for key in contexts[0].inner["lora"].records
    )
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**tiny_inputs(name))[0], after)


def test_shared_experts_of_a_moe_follow_the_router_of_their_block():
    model = made({"num_lora_experts": 2, "route_per": "block"}, "qwen2_moe")
    with trace_routing(model) as contexts:
        logits(model, "qwen2_moe")
    assert list(contexts[0].inner["lora"].records) == ["lora.0", "lora.1", "lora.2"]


# --- references ---


def folded(linear, gates, x):
    """`(W + sum_i g_i s_i B_i A_i) x` for one token at a time, in float64."""
    stack, rows = linear.moe_lora, []
    for token, gate in zip(x, gates, strict=True):
        weight = linear.weight.double()
        for i, rank in enumerate(stack.ranks):
            weight = weight + gate[i] * stack.scales[i] * stack.B[i, :rank].T.double() @ stack.A[i, :rank].double()
        rows.append(F.linear(token, weight, None if linear.bias is None else linear.bias.double()))
    return torch.stack(rows)


def top_gates(logits, k):
    """Softmax over the k largest logits."""
    out = torch.zeros_like(logits)
    for row, line in enumerate(logits):
        best = line.argsort(descending=True)[:k]
        out[row, best] = line[best].softmax(-1)
    return out


@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("routing", ["token", "sequence", "task"])
def test_a_linear_layer_equals_a_loop_over_folded_weights(routing, k):
    lora = {"num_lora_experts": 3, "target_modules": ["up_proj"], "num_experts_per_tok": k, "routing": routing}
    model = made({**lora, "num_tasks": 2} if routing == "task" else lora)
    seen = []
    linear = model.model.layers[1].mlp.up_proj
    linear.register_forward_hook(lambda m, args, out: seen.append((args[0].detach().double(), out.detach())))
    extra = {"task_ids": torch.tensor([1, 0])} if routing == "task" else {}
    logits(model, **extra)
    x, found = seen[0]
    for row in range(2):
        looked_at = x[row]
        if routing == "sequence":
            real = tiny_inputs("llama")["attention_mask"][row].bool()
            prefixes = [x[row, : t + 1][real[: t + 1]] for t in range(x.shape[1])]
            looked_at = torch.stack([rows.mean(0) if len(rows) else torch.zeros(32).double() for rows in prefixes])
        if routing == "task":
            looked_at = F.one_hot(torch.tensor([1 - row] * x.shape[1]), 2).double()
        gates = top_gates(looked_at @ linear.moe_lora_gate.weight.double().T, k or 3)
        torch.testing.assert_close(found[row], folded(linear, gates, x[row]).float(), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("k", [2, None])
def test_shared_base_equals_whole_blocks(k, name):
    """MixLoRA: W1 x once, against one block with folded weights for each expert."""
    if name == "opt":
        with pytest.raises(ValueError, match="one module"):
            made({"share_base_ffn": True, "route_per": "block"}, name)
        return
    model = made(
        {"num_lora_experts": 3, "r": 2, "share_base_ffn": True, "route_per": "block", "num_experts_per_tok": k}, name
    ).double()
    block = next(module for module in model.modules() if isinstance(module, SharedBaseFfn))
    x = torch.randn(5, block.moe_lora_gate.moe_site.hidden_size, dtype=torch.float64)
    gates = top_gates(x @ block.moe_lora_gate.weight.T, k or 3)
    wanted = torch.zeros_like(x)
    for expert in range(3):
        twin = copy.deepcopy(block)
        while hasattr(type(twin), "moe_stock_class"):
            twin.__class__ = type(twin).moe_stock_class
        for linear in twin.modules():
            if hasattr(linear, "moe_lora"):
                stack = linear.moe_lora
                delta = stack.scales[expert] * stack.B[expert].T @ stack.A[expert]
                with torch.no_grad():
                    linear.weight += delta.T if type(linear).__name__ == "Conv1D" else delta
        wanted = wanted + gates[:, expert : expert + 1] * twin(x)
    index = gates.argsort(dim=-1, descending=True)[:, : k or 3]
    found = block.mix(x, gates.gather(1, index), index)
    torch.testing.assert_close(found, wanted)
    router = block.moe_lora_gate
    record = router.route(x, None)
    torch.testing.assert_close(dense_gates(record.weights.double(), record.index, 3), gates, rtol=1e-6, atol=1e-7)


def test_weights_that_do_not_sum_to_one_keep_the_bias_in_proportion():
    model = made({"num_lora_experts": 2, "share_base_ffn": True, "route_per": "block"}, "gpt2").double()
    block = next(module for module in model.modules() if isinstance(module, SharedBaseFfn))
    nn.init.normal_(block.c_proj.bias)
    x = torch.randn(3, 32, dtype=torch.float64)
    one = block.mix(x, torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.long))
    half = block.mix(x, torch.full((3, 1), 0.5, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.long))
    torch.testing.assert_close(half, one / 2)
    unused = block.mix(x, torch.tensor([[1.0, 0.0]] * 3).double(), torch.tensor([[0, 2]] * 3))
    torch.testing.assert_close(unused, one)


@pytest.mark.parametrize("preset", ["mix_lora", "lora_moe", "ranks"])
def test_gradients_are_slopes(preset, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # routers compute in float32 otherwise
    model = made(PRESETS[preset]).double()
    kind = SharedBaseFfn if preset == "mix_lora" else LoraLinear
    module = next(
        module for module in model.modules() if isinstance(module, kind) and hasattr(module, "moe_lora_gate")
    )
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}
    x = torch.randn(4, module.moe_lora_gate.moe_site.hidden_size, dtype=torch.float64, requires_grad=True)

    def run(x, *tensors):
        return functional_call(module, dict(zip(parameters, tensors, strict=True)), (x,))

    assert len(parameters) == (7 if preset == "mix_lora" else 3)
    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True, rtol=1e-4)
    model(**tiny_inputs("llama")).logits.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# --- limiting cases ---


@torch.no_grad()
def make_equal(model):
    for module in model.modules():
        if isinstance(module, LoraStack):
            module.A.copy_(module.A[:1].clone())
            module.B.copy_(module.B[:1].clone())
    return model


@pytest.mark.parametrize("preset", ["mix_lora", "lora_moe", "block"])
def test_copies_of_one_adapter_are_that_adapter(preset):
    model = make_equal(made(PRESETS[preset]))
    mixed = logits(model)
    model.moe_link.active_adapters = ("0",)
    torch.testing.assert_close(logits(model), mixed, **CLOSE)
    single = made({**PRESETS[preset], "num_lora_experts": 1})
    stacks = [{n: m for n, m in model.named_modules() if isinstance(m, LoraStack)} for model in (model, single)]
    assert stacks[0].keys() == stacks[1].keys()
    with torch.no_grad():
        for name, stack in stacks[1].items():
            stack.A.copy_(stacks[0][name].A[:1])
            stack.B.copy_(stacks[0][name].B[:1])
    torch.testing.assert_close(logits(single), mixed, **CLOSE)


def test_equal_logits_give_the_mean_of_the_updates():
    model = made(PRESETS["lora_moe"])
    with torch.no_grad():
        for router in iter_routers(model):
            router.weight.zero_()
    found = logits(model)
    merged = restore(_folded(model, lambda stack: [1 / len(stack.names)] * len(stack.names)))
    torch.testing.assert_close(found, logits(merged), **CLOSE)


@torch.no_grad()
def _folded(model, gates):
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LoraLinear):
            for i, gate in enumerate(gates(module.moe_lora)):
                module.weight += gate * module.moe_lora.delta(i)
    return twin


@pytest.mark.parametrize("expert", [0, 2])
def test_one_active_adapter_is_its_folded_weights(expert):
    model = made({"num_lora_experts": 3, "target_modules": ["ffn", "attention"]})
    model.moe_link.active_adapters = (str(expert),)
    merged = restore(_folded(model, lambda stack: [float(i == expert) for i in range(3)]))
    torch.testing.assert_close(logits(model), logits(merged), **CLOSE)
    model.moe_link.adapters_enabled = False
    assert torch.equal(logits(model), logits(restore(copy.deepcopy(model))))


def test_some_active_adapters_are_chosen_among():
    model = made({"num_lora_experts": 4, "target_modules": ["up_proj"], "num_experts_per_tok": 2})
    model.moe_link.active_adapters = ("1", "2", "3")
    linear, seen = model.model.layers[0].mlp.up_proj, []
    linear.register_forward_hook(lambda m, args, out: seen.append((args[0].detach().double()[0], out.detach()[0])))
    logits(model)
    x, found = seen[0]
    scores = x @ linear.moe_lora_gate.weight.double().T
    scores[:, 0] = float("-inf")
    torch.testing.assert_close(found, folded(linear, top_gates(scores, 2), x).float(), **CLOSE)


def test_equal_counts_are_a_fixed_count():
    wanted = made({"preset": "mola", "num_lora_experts": 3})
    found = made({"preset": "mola", "num_lora_experts": [3, 3, 3]})
    found.load_state_dict(wanted.state_dict())
    assert torch.equal(logits(found), logits(wanted))


def test_lists_are_cut_along_the_layers():
    model = extend(
        tiny_model("llama", num_hidden_layers=4),
        {"lora_experts": {"num_lora_experts": [2, 5], "r": [1, 2, 3, 4], "target_modules": ["up_proj"]}},
    )
    stacks = [layer.mlp.up_proj.moe_lora for layer in model.model.layers]
    assert [tuple(stack.A.shape[:2]) for stack in stacks] == [(2, 1), (2, 2), (5, 3), (5, 4)]
    assert [stack.scales[0] for stack in stacks] == [16.0, 8.0, 16 / 3, 4.0]


def test_the_chosen_experts_and_the_gate_get_gradients_and_no_others():
    model = made({"num_lora_experts": 4, "target_modules": ["up_proj"], "num_experts_per_tok": 2})
    with trace_routing(model) as contexts:
        model(input_ids=torch.tensor([[5]])).logits.sum().backward()
    for layer, record in zip(model.model.layers, contexts[0].inner["lora"].records.values(), strict=True):
        stack, gate = layer.mlp.up_proj.moe_lora, layer.mlp.up_proj.moe_lora_gate
        chosen = set(record.index[0].tolist())
        assert len(chosen) == 2
        for expert in range(4):
            for tensor in (stack.A, stack.B):
                assert bool(tensor.grad[expert].any()) == (expert in chosen)
            # Softmax over all and division by the sum: 0 but for rounding.
            assert bool(gate.weight.grad[expert].norm() > 1e-6 * gate.weight.grad.norm()) == (expert in chosen)


def test_filled_up_ranks_stay_zero_in_training():
    model = made(PRESETS["ranks"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = tiny_inputs("llama")["input_ids"]
    before = model.model.layers[0].mlp.up_proj.moe_lora.A.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    stack = model.model.layers[0].mlp.up_proj.moe_lora
    assert stack.ranks == (2, 5) and stack.scales == (8.0, 0.6)
    assert not stack.A[0, 2:].any() and not stack.B[0, 2:].any() and stack.A[1].all()
    assert not torch.equal(stack.A, before)


# --- losses ---


def test_localized_loss_of_a_batch_worked_out_by_hand():
    scores = torch.tensor([[0.6, 0.1, 0.2, 0.1], [0.2, 0.3, 0.4, 0.1], [0.1, 0.1, 0.1, 0.7]])
    rows = torch.tensor([0, 0, 1])
    tasks = torch.tensor([0, 0, 1])
    z = torch.tensor([[0.4 * 1.2, 0.2 * 1.2, 0.3 * 0.8, 0.1 * 0.8], [0.1 * 0.8, 0.1 * 0.8, 0.1 * 1.2, 0.7 * 1.2]])
    found = localized_balancing_loss(scores, rows, tasks, offset=0.2)
    torch.testing.assert_close(found, z.var() / z.mean() ** 2)
    masked = localized_balancing_loss(scores, rows, tasks, offset=0.2, mask=torch.tensor([True, False, False]))
    z = torch.tensor([0.6 * 1.2, 0.1 * 1.2, 0.2 * 0.8, 0.1 * 0.8])
    torch.testing.assert_close(masked, z.var() / z.mean() ** 2)
    with pytest.raises(ValueError, match="from 0 to 1"):
        localized_balancing_loss(scores, rows, tasks + 1)


def test_localized_loss_is_zero_where_weighted_sums_are_equal():
    """Scores that undo the factors: 1/(1 + d) for the own group, 1/(1 - d) for the other."""
    own, other = 1 / 1.1, 1 / 0.9
    scores = torch.tensor([[own, own, other, other], [other, other, own, own]])
    scores = scores / scores.sum(-1, keepdim=True)
    tasks, rows = torch.tensor([0, 1]), torch.tensor([0, 1])
    assert localized_balancing_loss(scores, rows, tasks) < 1e-12
    assert localized_balancing_loss(scores, rows, 1 - tasks) > 1e-3
    assert localized_balancing_loss(torch.full((4, 3), 1 / 3), torch.tensor([0, 0, 1, 1])) < 1e-12


def test_losses_of_adapters_are_told_apart_and_reach_the_gates():
    model = made(PRESETS["lora_moe"]).train()
    ids = tiny_inputs("llama")["input_ids"]
    with trace_routing(model) as contexts:
        out = model(ids, labels=ids, task_ids=torch.tensor([0, 1]))
    total, named = auxiliary_losses(contexts)
    assert list(named) == ["lora_localized"]
    plain = copy.deepcopy(model).eval()(ids, labels=ids).loss
    torch.testing.assert_close(out.loss, plain + 0.1 * named["lora_localized"])
    torch.testing.assert_close(total, 0.1 * named["lora_localized"])
    total.backward()
    assert all(router.weight.grad.any() for router in iter_routers(model))
    records = contexts[0].inner["lora"].records
    by_hand = [
        localized_balancing_loss(r.scores, torch.arange(2).repeat_interleave(7), torch.arange(2).repeat_interleave(7))
        for r in records.values()
    ]
    torch.testing.assert_close(named["lora_localized"], torch.stack(by_hand).mean())
    assert len(model(ids, output_router_logits=True).lora_router_logits) == 9


def test_a_moe_keeps_its_own_records():
    extension = {"router": "top_k", "lora_experts": {"target_modules": ["attention"], "num_lora_experts": 3}}
    model = randomize(extend(tiny_model("mixtral"), extension))
    out = model(**tiny_inputs("mixtral"), output_router_logits=True)
    assert [r.shape[-1] for r in out.router_logits] == [8] * 3
    assert [r.shape[-1] for r in out.lora_router_logits] == [3] * 12


# --- sequences, tasks, batches ---


def test_a_token_does_not_see_later_ones():
    model = made({"num_lora_experts": 3, "num_experts_per_tok": 1, "routing": "sequence"})
    ids = tiny_inputs("llama")["input_ids"]
    changed = ids.clone()
    changed[:, -1] = 7
    torch.testing.assert_close(model(ids).logits[:, :-1], model(changed).logits[:, :-1])


@pytest.mark.parametrize("route_per", ["linear", "block"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_by_sequence_equals_that_without_a_cache(beams, route_per):
    model = made({"num_lora_experts": 3, "num_experts_per_tok": 1, "routing": "sequence", "route_per": route_per})
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    options = {
        "attention_mask": (ids > 0).long(),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "num_beams": beams,
        "do_sample": False,
    }
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_a_cache_that_was_filled_without_the_adapters_is_refused():
    model = made({"num_lora_experts": 2, "routing": "sequence"})
    name = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
    cache = DynamicCache(config=model.config)
    tiny_model("llama")(torch.tensor([[5, 6]]), **{name: cache})
    with pytest.raises(ValueError, match="filled without them"):
        model(torch.tensor([[7]]), **{name: cache})
    cache = DynamicCache(config=model.config)
    whole = logits_of(model, torch.tensor([[5, 6, 7]]))
    logits_of(model, torch.tensor([[5, 6]]), **{name: cache})
    torch.testing.assert_close(
        logits_of(model, torch.tensor([[7]]), **{name: copy.deepcopy(cache)})[:, 0], whole[:, 2]
    )
    assert isinstance(cache, DynamicCache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)


def test_rows_do_not_depend_on_each_other_or_on_padding():
    model = made({"num_lora_experts": 3, "num_experts_per_tok": 1, "routing": "sequence"})
    ids = torch.tensor([[5, 6, 7, 8]])
    alone = logits_of(model, ids)
    padded = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    mask = (padded > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[:1, 2:], alone, **CLOSE)


def logits_of(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def test_tasks():
    model = made({"num_lora_experts": 3, "num_experts_per_tok": 1, "routing": "task", "num_tasks": 3})
    ids = tiny_inputs("llama")["input_ids"][:1].repeat(3, 1)
    found = logits_of(model, ids, task_ids=torch.tensor([0, 1, 2]))
    for task in range(3):
        alone = logits_of(model, ids[:1], task_ids=torch.tensor([task]))
        torch.testing.assert_close(found[task : task + 1], alone, **CLOSE)
    assert (found[0] - found[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="need the task of each row"):
        model(ids)
    with pytest.raises(ValueError, match="from 0 to 2"):
        model(ids, task_ids=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="tasks of 2 rows, but this forward has 3"):
        model(ids, task_ids=torch.tensor([0, 1]))


@pytest.mark.parametrize("preset", ["mix_lora", "lora_moe", "block"])
def test_checkpointing_gives_the_same_gradients(preset):
    found = []
    for checkpointing in (False, True):
        model = made(PRESETS[preset]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        ids = tiny_inputs("llama")["input_ids"]
        model(ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **CLOSE)


@pytest.mark.parametrize("preset", ["mix_lora", "mola"])
def test_generation_with_a_cache(preset):
    model = made(PRESETS[preset])
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_rows_may_follow_policies():
    model = made({"num_lora_experts": 3, "num_experts_per_tok": 2, "target_modules": ["up_proj"]})
    ids = tiny_inputs("llama")["input_ids"][:1].repeat(2, 1)
    with route_rows(model, ["a", "b"], {"b": {"num_experts_per_tok": 1}}):
        found = logits_of(model, ids)
    torch.testing.assert_close(found[:1], logits_of(model, ids[:1]), **CLOSE)
    assert (found[0] - found[1]).abs().max() > 1e-3


# --- saving, declaration ---


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_and_loaded_it_is_the_same_model(preset, tmp_path):
    model = made(PRESETS[preset])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and trained == {name for name, p in again.named_parameters() if p.requires_grad}
    assert all(".moe_lora." in name or ".moe_lora_gate." in name for name in trained)
    data = json.loads((tmp_path / "config.json").read_text())["moe_ext"]
    assert MoeExtension.from_dict(data).to_dict() == data == model.config.moe_ext


def test_presets_round_trip():
    for name in ("mix_lora", "lora_moe", "mola"):
        extension = MoeExtension(lora_experts=name)
        assert extension == MoeExtension.from_dict(json.loads(json.dumps(extension.to_dict())))
        assert extension.lora_experts == LoraExpertsConfig.preset(name)
    assert MoeExtension(lora_experts={"preset": "mola", "r": 4}).lora_experts == LoraExpertsConfig.preset("mola", r=4)
    ranks = MoeExtension(lora_experts=PRESETS["ranks"])
    assert ranks == MoeExtension.from_dict(json.loads(json.dumps(ranks.to_dict())))
    assert ranks.lora_experts.num_lora_experts == 2


def test_new_adapters_are_as_in_peft():
    torch.manual_seed(0)
    stack = (
        extend(tiny_model("llama", hidden_size=64), {"lora_experts": {"r": 16, "target_modules": ["up_proj"]}})
        .model.layers[0]
        .mlp.up_proj.moe_lora
    )
    assert not stack.B.any() and stack.A.abs().max() <= 64**-0.5
    assert abs(float(stack.A.detach().std()) - 64**-0.5 / 3**0.5) < 2e-3  # uniform


def test_exceptions_by_layer():
    model = extend(tiny_model("llama"), MoeExtension(lora_experts="lora_moe", layers={"1": None}))
    assert not any(isinstance(m, LoraStack) for m in model.model.layers[1].modules())
    assert any(isinstance(m, LoraStack) for m in model.model.layers[2].modules())
    assert "lora" not in str(describe(model).layers[1])


def test_a_router_of_the_zoo():
    lora = {"num_lora_experts": 4, "router": {"type": "top_p", "threshold": 0.999}, "route_per": "block"}
    model = made(lora)
    with trace_routing(model) as contexts:
        logits(model)
    used = {int((r.index < 4).sum(-1).max()) for r in contexts[0].inner["lora"].records.values()}
    assert used and max(used) > 1


BAD = {
    "preset": ("mixlora", ValueError, "unknown preset of LoRA experts `mixlora`.*Did you mean `mix_lora`"),
    "key": ({"rank": 3}, ValueError, "`lora_experts`: unknown key `rank`"),
    "rank": ({"r": 0}, ValueError, "`r` must be a whole number above 0.*got 0"),
    "ranks": ({"r": [4, 0]}, ValueError, "`r` must be a whole number above 0"),
    "rank_type": ({"r": 1.5}, TypeError, "`r` of LoraExpertsConfig must be int or list"),
    "dropout": ({"lora_dropout": 1.0}, ValueError, r"`lora_dropout` must be in \[0, 1\)"),
    "tasks": ({"routing": "task"}, ValueError, "`num_tasks` go together"),
    "shared": ({"share_base_ffn": True}, ValueError, 'needs `route_per="block"`'),
    "router": ({"router": {"type": "topp"}}, ValueError, "unknown router type"),
    "router_type": ({"router": 3}, TypeError, "`router` must be a RouterConfig"),
    "modules": ({"target_modules": []}, ValueError, "`target_modules` must be names"),
    "no_module": ({"target_modules": ["w1"]}, ValueError, r"\['w1'\] name no linear layer.*'up_proj'"),
    "both": ({"unrouted_modules": ["up_proj"]}, ValueError, "both in `target_modules` and in `unrouted_modules`"),
    "cut": ({"num_lora_experts": [2, 4]}, ValueError, "2 entries, which do not divide the 3 layers"),
    "top_k": ({"num_lora_experts": 2, "router": {"type": "top_k", "num_experts_per_tok": 3}}, ValueError, "exceeds"),
    "mixing": ({"router": "soft_moe"}, ValueError, "mixtures of tokens; adapters take tokens"),
    "crossing": ({"router": "rmoe"}, ValueError, "no place in front of adapters"),
    "names": ({"adapters": [{"name": "a"}, {"name": "a"}]}, ValueError, "must differ"),
    "path": ({"adapters": [{"name": "../a"}]}, ValueError, "must be letters, digits"),
    "adapter_rank": ({"adapters": [{"name": "a", "r": -1}]}, ValueError, "the rank of the adapter `a`"),
    "outside": (
        {"share_base_ffn": True, "route_per": "block", "target_modules": ["ffn", "q_proj"]},
        ValueError,
        "outside.*`unrouted_modules`",
    ),
}


@pytest.mark.parametrize(("lora", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(lora, error, message):
    model = tiny_model("llama")
    before = dict(model.state_dict())
    with pytest.raises(error, match=message):
        extend(model, {"lora_experts": lora})
    assert list(model.state_dict()) == list(before) and type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "moe_ext")


def test_routed_experts_are_no_linear_layers():
    with pytest.raises(ValueError, match="adapters on them are `expert_lora`"):
        extend(tiny_model("mixtral"), {"lora_experts": {}})


def test_a_block_that_computes_more_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda m, args, out: 2 * out)
    with pytest.raises(ValueError, match="computes more than gate, up"):
        extend(model, {"lora_experts": "mix_lora"})


def test_outside_of_a_forward():
    model = made(PRESETS["block"])
    with pytest.raises(ValueError, match="inside a forward"):
        model.model.layers[0].mlp(torch.randn(1, 2, 32))
    assert RoutingContext().attention is None
