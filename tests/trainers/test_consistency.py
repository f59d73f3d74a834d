"""Consistency training of THOR: the loss against slow references, the two passes, and what they cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_moe_ext import (
    MoeExtension,
    MoETrainer,
    StochasticRouterConfig,
    TopKRouterConfig,
    extend,
    trace_routing,
    upcycle,
)
from hf_moe_ext.modeling.moe_structure import iter_routers
from hf_moe_ext.trainers.consistency import consistency_loss, symmetric_kl

from ..character_runs import character_llama, held_out_loss, train_characters
from ..tiny_models import tiny_inputs, tiny_model
from .common import arguments, logged, rows, sgd, stock_mixtral, tiny_moe, train
from .test_losses import EPSILON, PADDED, PATHS, cross_entropy


COEF = 3.0


def thor(**options) -> StochasticRouterConfig:
    return StochasticRouterConfig(**({"consistency_coef": COEF} | options))


# --- the loss ---


def test_it_is_the_mean_of_both_divergences():
    first, second = torch.randn(2, 4, 7, 11, dtype=torch.float64).float()
    one, two = first.log_softmax(-1), second.log_softmax(-1)
    forward = F.kl_div(two, one, log_target=True, reduction="none").sum(-1)
    backward = F.kl_div(one, two, log_target=True, reduction="none").sum(-1)
    found = symmetric_kl(first, second)
    torch.testing.assert_close(found, (forward + backward) / 2)
    assert (found > 0).all() and torch.equal(found, symmetric_kl(second, first))
    assert torch.equal(symmetric_kl(first, first), torch.zeros(4, 7))
    torch.testing.assert_close(symmetric_kl(first, first + 3), torch.zeros(4, 7), atol=1e-6, rtol=0)


def test_its_gradient_is_the_one_worked_out_by_hand():
    """1/2 [p1 (log p1 - log p2 - KL(p1 || p2)) + p1 - p2], and the same for the other side."""
    first, second = torch.randn(2, 5, 11, requires_grad=True)
    gradients = torch.autograd.grad(symmetric_kl(first, second).sum(), (first, second))
    for (a, b), gradient in zip(((first, second), (second, first)), gradients, strict=True):
        p, q = a.detach().softmax(-1), b.detach().softmax(-1)
        ratio = p.log() - q.log()
        divergence = (p * ratio).sum(-1, keepdim=True)
        torch.testing.assert_close(gradient, 0.5 * (p * (ratio - divergence) + p - q))


def test_it_is_in_float32_whatever_the_model():
    first, second = torch.randn(2, 5, 11).bfloat16()
    assert torch.equal(symmetric_kl(first, second), symmetric_kl(first.float(), second.float()))


def slow_consistency(first, second, labels, shift: bool) -> tuple[torch.Tensor, int]:
    """Sum over positions with a label, one at a time in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1]):
            source = position - 1 if shift else position
            if labels[row, position] == -100 or source < 0:
                continue
            p, q = (logits[row, source].double().softmax(-1) for logits in (first, second))
            total = total + 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
            count += 1
    return total, count


@pytest.mark.parametrize("shift", [True, False])
def test_only_positions_with_a_label_count(shift):
    first, second = torch.randn(2, 3, 6, 11)
    labels = torch.randint(0, 11, (3, 6)).masked_fill(torch.rand(3, 6) < 0.4, -100)
    total, count = slow_consistency(first, second, labels, shift)
    found = consistency_loss(first, second, labels, shift=shift)
    assert found.item() == pytest.approx(total.item() / count, rel=1e-5)
    nothing = torch.full_like(labels, -100)
    assert consistency_loss(first, second, nothing, shift=shift).item() == 0.0


def test_classifiers_compare_their_rows():
    first, second = torch.randn(2, 4, 3)
    found = consistency_loss(first, second, torch.tensor([0, 2, -100, 1]), shift=False)
    assert found.item() == pytest.approx(symmetric_kl(first, second)[[0, 1, 3]].mean().item(), rel=1e-6)
    with pytest.raises(
        ValueError, match=r"labels of shape \(4,\) and type torch.float32 do not fit.*consistency_coef=0"
    ):
        consistency_loss(first, second, torch.rand(4), shift=False)


# --- one step ---


def own_draws(model, seed: int = 11) -> None:
    """Let the routers of a model draw from a generator of their own."""
    model.moe_link.generator = torch.Generator().manual_seed(seed)


def reference(model, data, size: int, epsilon: float = 0.0) -> tuple[torch.Tensor, dict[str, float]]:
    """CE1 + CE2 + coef * CR over all labels of an optimizer step, micro-batch by micro-batch."""
    batches = [data[i : i + size] for i in range(0, len(data), size)]
    batches = [{name: torch.stack([row[name] for row in batch]) for name in batch[0]} for batch in batches]
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    entropy, consistency = torch.zeros(()), torch.zeros(())
    for batch in batches:
        labels = batch.pop("labels")
        outputs = [model(**batch).logits for _ in range(2)]
        for logits in outputs:
            entropy = entropy + cross_entropy(logits, labels, epsilon)[0] / items
        consistency = consistency + slow_consistency(*outputs, labels, True)[0] / items
    total = entropy + COEF * consistency
    return total, {"lm": entropy.item(), "consistency": consistency.item()}


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("size", [4, 2, 1], ids=["4x1", "2x2", "1x4"])
@pytest.mark.parametrize(
    "data", [rows(PADDED, left=True), rows(PADDED, prompts=[4, 0, 2, 1])], ids=["left_padded", "prompts"]
)
def test_one_step_follows_the_reference(tmp_path, path, size, data):
    """Weights after one step of plain gradient descent, and what is logged: exact under gradient accumulation."""
    model, twin = tiny_moe(thor()), tiny_moe(thor()).train()
    own_draws(twin)
    epsilon = EPSILON if path == "smoothing" else 0.0
    total, parts = reference(twin, data, size, epsilon)
    total.backward()

    options = dict(PATHS[path])
    extra = {"compute_loss_func": options.pop("compute_loss_func")} if path == "custom" else {}
    args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **sgd())
    args.label_smoothing_factor = options.get("label_smoothing_factor", 0.0)
    trainer = MoETrainer(model=model, args=args, train_dataset=data, **extra)
    own_draws(model)
    trainer.train()

    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        moved = expected[name] if gradient is None else expected[name] - gradient
        torch.testing.assert_close(parameter, moved, atol=2e-5, rtol=1e-5, msg=name)
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert line["moe/lm_loss"] == pytest.approx(parts["lm"], rel=1e-5)
    assert line["moe/loss_consistency"] == pytest.approx(parts["consistency"], rel=1e-4)
    assert line["loss"] == pytest.approx(line["moe/lm_loss"] + line["moe/aux_loss"], rel=1e-6)
    assert parts["consistency"] > 0.01


def test_padding_changes_nothing(tmp_path):
    data, wide = rows([9, 5, 7, 3]), []
    for row in data:
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        wide.append({name: F.pad(tensor, (0, 4), value=padding[name]) for name, tensor in row.items()})
    lines = []
    for number, rows_ in enumerate((data, wide)):
        model = tiny_moe(thor())
        own_draws(model)
        lines.append(train(model, rows_, tmp_path / str(number), per_device_train_batch_size=4).state.log_history[0])
    for key in ("loss", "moe/loss_consistency", "grad_norm"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-5)


def test_one_expert_is_twice_the_plain_loss(tmp_path):
    """A sum of two losses, not their mean: the gradient is twice as large, and the passes agree exactly."""
    data, lines = rows(PADDED), []
    for router in (thor(), TopKRouterConfig()):
        model = extend(stock_mixtral(num_local_experts=1, num_experts_per_tok=1), MoeExtension(router=router))
        trainer = train(model, data, tmp_path, per_device_train_batch_size=4, **sgd())
        lines.append(trainer.state.log_history[0])
    assert lines[0]["moe/loss_consistency"] == 0.0
    assert lines[0]["loss"] == pytest.approx(2 * lines[1]["loss"], rel=1e-6)
    assert lines[0]["grad_norm"] == pytest.approx(2 * lines[1]["grad_norm"], rel=1e-5)


def test_equal_experts_agree_exactly(tmp_path):
    model = upcycle(tiny_model("llama"), num_experts=4, router=thor(), check=False)
    data = [{"input_ids": row, "labels": row} for row in tiny_inputs("llama", batch=4)["input_ids"]]
    trainer = train(model, data, tmp_path)
    assert logged(trainer, "moe/loss_consistency")[0] == pytest.approx(0.0, abs=1e-10)
    assert logged(trainer, "loss")[0] > 1


def count_passes(model) -> list[bool]:
    """Whether the model trained, for every forward."""
    passes: list[bool] = []
    model.model.register_forward_pre_hook(lambda module, args: passes.append(module.training))
    return passes


@pytest.mark.parametrize(("coef", "expected"), [(2.0, 2), (0.0, 1)])
def test_number_of_passes(tmp_path, coef, expected):
    """Two in training, one without the loss, one in evaluation."""
    model, data = tiny_moe(thor(consistency_coef=coef)), rows(PADDED)
    passes = count_passes(model)
    trainer = MoETrainer(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    assert passes == [True] * expected
    assert ("moe/loss_consistency" in trainer.state.log_history[0]) == (coef > 0)
    passes.clear()
    loss = trainer.evaluate()["eval_loss"]
    assert passes == [False]
    batch = {name: torch.stack([row[name] for row in data[:2]]) for name in data[0]}
    with torch.no_grad():
        assert loss == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-6)


def test_the_passes_draw_independently(tmp_path):
    model = tiny_moe(thor())
    with trace_routing(model) as contexts:
        train(model, rows(PADDED * 8), tmp_path, max_steps=16)
    drawn = [int(context.records["0"].index[0, 0]) for context in contexts]
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    assert len(pairs) == 16 and any(one != two for one, two in pairs) and len(set(drawn)) > 3


def test_encoder_decoder_labels_are_not_shifted(tmp_path):
    model = extend(
        tiny_model("switch_transformers", dropout_rate=0.0, router_jitter_noise=0.0), MoeExtension(router=thor())
    )
    inputs = tiny_inputs("switch_transformers", batch=2)
    inputs["labels"] = inputs["decoder_input_ids"].clone()
    inputs["labels"][0, -2:] = -100
    own_draws(model)
    model.train()
    with torch.no_grad():
        first, second = (model(**inputs).logits for _ in range(2))
    total, count = slow_consistency(first, second, inputs["labels"], False)
    own_draws(model)
    data = [{name: value[row] for name, value in inputs.items()} for row in range(2)]
    trainer = train(model, data, tmp_path)
    assert logged(trainer, "moe/loss_consistency")[0] == pytest.approx(total.item() / count, rel=1e-4)


def test_the_trained_model_needs_no_trainer(tmp_path):
    model = tiny_moe(thor())
    trainer = train(model, rows(PADDED), tmp_path / "run")
    ids = torch.randint(1, 64, (2, 7))
    trainer.model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert again.generate(ids, **options).shape == (2, 11)


# --- what is refused ---


def test_layers_that_disagree_are_refused(tmp_path):
    extension = {"router": thor(), "layers": {"1": {"router": {"type": "stochastic", "consistency_coef": 1.0}}}}
    model = extend(stock_mixtral(), MoeExtension(**extension))
    with pytest.raises(ValueError, match=r"different values of `consistency_coef`: \[1.0, 3.0\]"):
        MoETrainer(model=model, args=arguments(tmp_path), train_dataset=rows(PADDED))


def test_logits_and_labels_are_needed(tmp_path):
    model = tiny_moe(thor()).train()
    trainer = MoETrainer(
        model=model, args=arguments(tmp_path), compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum()
    )
    batch = {name: torch.stack([row[name] for row in rows(PADDED)]) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="counts at the labels, and this batch has none"):
        trainer.compute_loss(model, batch)
    batch["labels"] = batch["input_ids"]
    original = model.forward
    model.forward = lambda **kwargs: original(**kwargs).to_tuple()
    trainer.compute_loss_func = lambda outputs, labels, **_: outputs[0].sum()
    with pytest.raises(ValueError, match="need the logits, which this model does not return"):
        trainer.compute_loss(model, batch)


# --- the claim of the paper ---


@pytest.mark.slow
def test_consistency_makes_experts_agree(tmp_path):
    """4 experts, two passes against plain random training for the same steps: the held-out losses of the single
    experts lie closer together, and are lower."""
    spread, mean = {}, {}
    for coef in (0.0, 5.0):
        router = StochasticRouterConfig(consistency_coef=coef, inference_draw="fixed")
        model = upcycle(character_llama(), "drop", num_experts=4, drop_ratio=1.0, router=router, check=False)
        train_characters(model, tmp_path / str(coef), 800)
        losses = []
        for expert in range(4):
            for layer_router in iter_routers(model):
                layer_router.moe_config.expert = expert
            losses.append(held_out_loss(model))
        values = torch.tensor(losses)
        spread[coef], mean[coef] = float(values.std(correction=0)), float(values.mean())
    print("standard deviation over experts:", spread, "mean held-out loss:", mean)
    assert spread[5.0] < spread[0.0] / 2 and mean[5.0] < mean[0.0]
