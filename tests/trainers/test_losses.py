"""Losses of `MoETrainer` against a slow reference: values, gradients, logs."""

from __future__ import annotations

import pytest
import torch

from hf_moe_ext import MoeExtension, MoETrainer, TopKRouterConfig, TopPRouterConfig, extend, trace_routing
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.modeling.moe_losses import router_z_loss

from ..tiny_models import tiny_inputs, tiny_model
from .common import NUM_EXPERTS, arguments, logged, rows, sgd, snapshot, tiny_moe, train


COEFS = {"balance": 0.3, "z": 0.05, "entropy": 0.2}
EPSILON = 0.2
EQUAL = [9] * 4
PADDED = [9, 5, 7, 3]


def router(**coefs: float) -> TopPRouterConfig:
    values = {f"{name}_coef": coefs.get(name, 0.0) for name in COEFS}
    return TopPRouterConfig(threshold=0.5, **values)


def slow_losses(logits: torch.Tensor, index: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Auxiliary losses of one layer, token by token."""
    tokens = [t for t in range(logits.shape[0]) if mask[t]]
    chosen = torch.zeros(NUM_EXPERTS)
    for t in tokens:
        for expert in index[t].tolist():
            if expert < NUM_EXPERTS:
                chosen[expert] += 1
    scores = [logits[t].float().softmax(-1) for t in tokens]
    return {
        "balance": NUM_EXPERTS * (chosen / len(tokens) * (sum(scores) / len(tokens))).sum(),
        "z": sum(logits[t].float().logsumexp(-1) ** 2 for t in tokens) / len(tokens),
        "entropy": sum(-(s * s.log()).sum() for s in scores) / len(tokens),
    }


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, int]:
    """Sum of the (smoothed) loss over positions with a label, each predicted from the position before it."""
    total, count = torch.zeros(()), 0
    for row in range(labels.shape[0]):
        for position in range(1, labels.shape[1]):
            target = labels[row, position]
            if target == -100:
                continue
            log_probs = logits[row, position - 1].log_softmax(-1)
            total = total - (1 - epsilon) * log_probs[target] - epsilon * log_probs.mean()
            count += 1
    return total, count


def reference(model, data, size: int, epsilon: float = 0.0) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of one optimizer step over micro-batches of `size` rows, and its parts."""
    batches = [data[i : i + size] for i in range(0, len(data), size)]
    batches = [{name: torch.stack([row[name] for row in batch]) for name in batch[0]} for batch in batches]
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    parts = dict.fromkeys(("lm", *COEFS), 0.0)
    for batch in batches:
        labels = batch.pop("labels")
        with trace_routing(model) as contexts:
            logits = model(**batch).logits
        loss, count = cross_entropy(logits, labels, epsilon)
        parts["lm"] = parts["lm"] + loss / items
        records = contexts[0].records.values()
        for record in records:
            losses = slow_losses(record.logits, record.index, batch["attention_mask"].reshape(-1))
            for name, value in losses.items():
                parts[name] = parts[name] + count / items * value / len(records)
    total = parts["lm"] + sum(COEFS[name] * parts[name] for name in COEFS)
    return total, {name: float(torch.as_tensor(value).detach()) for name, value in parts.items()}


def custom_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels, 0.0)[0] / num_items_in_batch


PATHS = {"model": {}, "smoothing": {"label_smoothing_factor": EPSILON}, "custom": {"compute_loss_func": custom_loss}}


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("size", [4, 2, 1], ids=["4x1", "2x2", "1x4"])
@pytest.mark.parametrize(
    "data",
    [rows(EQUAL), rows(PADDED, left=True), rows(PADDED, prompts=[4, 0, 2, 1])],
    ids=["equal", "left_padded", "prompts"],
)
def test_one_step_follows_the_reference(tmp_path, path, size, data):
    """Weights after one step of plain gradient descent, and every logged loss."""
    model, twin = tiny_moe(router(**COEFS)), tiny_moe(router(**COEFS)).train()
    epsilon = EPSILON if path == "smoothing" else 0.0
    total, parts = reference(twin, data, size, epsilon)
    total.backward()

    options = dict(PATHS[path])
    extra = {"compute_loss_func": options.pop("compute_loss_func")} if path == "custom" else {}
    args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **sgd())
    args.label_smoothing_factor = options.get("label_smoothing_factor", 0.0)
    trainer = MoETrainer(model=model, args=args, train_dataset=data, **extra)
    trainer.train()

    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        torch.testing.assert_close(parameter, expected[name] - gradient, atol=2e-5, rtol=1e-5, msg=name)
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert line["moe/lm_loss"] == pytest.approx(parts["lm"], rel=1e-5)
    for name in COEFS:
        assert line[f"moe/loss_{name}"] == pytest.approx(parts[name], rel=1e-5)
    assert line["loss"] == pytest.approx(line["moe/lm_loss"] + line["moe/aux_loss"], rel=1e-6)


def weights_after_one_step(folder, size: int, **coefs: float) -> dict[str, torch.Tensor]:
    model = tiny_moe(router(**coefs))
    steps = 8 // size
    options = sgd(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    train(model, rows([9] * 8), folder, **options)
    return snapshot(model)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_accumulation_equals_one_batch_for_token_means(tmp_path):
    """Rows of one length: the z-loss and the entropy are means over tokens, so their parts add up."""
    coefs = {"z": 0.05, "entropy": 0.2}
    whole, parts = (
        weights_after_one_step(tmp_path / "a", 8, **coefs),
        weights_after_one_step(tmp_path / "b", 1, **coefs),
    )

    assert largest_difference(whole, parts) < 2e-6


def test_accumulated_balance_loss_is_the_mean_over_micro_batches(tmp_path):
    """The balance loss is a product of two means: over micro-batches it is another, stricter loss."""
    whole, parts = (
        weights_after_one_step(tmp_path / "a", 8, balance=1.0),
        weights_after_one_step(tmp_path / "b", 1, balance=1.0),
    )

    assert largest_difference(whole, parts) > 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.3], ids=["plain", "smoothed"])
def test_evaluation_loss_holds_no_auxiliary_loss(tmp_path, smoothing):
    data = rows(PADDED)
    model = tiny_moe(router(balance=5.0, z=5.0, entropy=5.0))
    args = arguments(tmp_path, label_smoothing_factor=smoothing, per_device_eval_batch_size=4)
    loss = MoETrainer(model=model, args=args, eval_dataset=data).evaluate()["eval_loss"]

    model.eval()
    assert loss == pytest.approx(reference(model, data, 4, smoothing)[1]["lm"], rel=1e-5)


def test_smoothed_loss_of_uniform_logits(tmp_path):
    """With equal logits every target costs log V, whatever the smoothing."""
    model = tiny_moe()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    trainer = train(model, rows(PADDED), tmp_path, label_smoothing_factor=0.3, per_device_train_batch_size=4)

    assert logged(trainer, "loss")[0] == pytest.approx(torch.tensor(64.0).log().item(), rel=1e-6)


def test_losses_of_weight_zero_are_not_logged(tmp_path):
    trainer = train(tiny_moe(router(z=0.1)), rows(EQUAL), tmp_path)

    assert {key for key in trainer.state.log_history[0] if "loss" in key} == {
        "loss",
        "moe/loss_z",
        "moe/lm_loss",
        "moe/aux_loss",
    }


@pytest.mark.parametrize("name", ["mixtral", "minimax_m3_vl", "openai_privacy_filter", "switch_transformers"])
def test_share_counts_the_labels_that_the_loss_uses(tmp_path, name):
    """Text, images and text, tags, two stacks: a whole batch has the share 1, so the z-loss is logged as it is."""
    if get_family(name) is None:
        pytest.skip("this transformers has no supported version of the architecture")
    quiet = {"dropout_rate": 0.0, "router_jitter_noise": 0.0} if name == "switch_transformers" else {}
    model = extend(tiny_model(name, **quiet), MoeExtension(router=TopKRouterConfig(z_coef=0.1)))
    inputs = tiny_inputs(name, batch=4)
    inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    if name == "openai_privacy_filter":
        inputs["labels"] = inputs["labels"] % model.config.num_labels
    with trace_routing(model) as contexts, torch.no_grad():
        model(**inputs)
    losses = [
        router_z_loss(record.logits, context.token_mask(record.logits.shape[0]))
        for context in contexts
        for record in context.records.values()
    ]
    data = [{key: value[row] for key, value in inputs.items()} for row in range(4)]
    trainer = train(model, data, tmp_path, per_device_train_batch_size=4)

    assert logged(trainer, "moe/loss_z")[0] == pytest.approx(float(sum(losses)) / len(losses), rel=1e-4)


def test_losses_are_means_over_the_steps_since_the_last_log(tmp_path):
    data = rows(PADDED * 2)
    options = {"max_steps": 4, "learning_rate": 0.0}
    single = train(tiny_moe(router(**COEFS)), data, tmp_path / "a", logging_steps=1, **options)
    pairs = train(tiny_moe(router(**COEFS)), data, tmp_path / "b", logging_steps=2, **options)

    for key in ("moe/lm_loss", "moe/loss_z", "moe/loss_balance", "moe/aux_loss"):
        one = logged(single, key)
        assert logged(pairs, key) == pytest.approx([(one[0] + one[1]) / 2, (one[2] + one[3]) / 2], rel=1e-5)


def test_router_bias_follows_the_load_of_each_step(tmp_path):
    """Loss-free balancing: the bias of experts above the mean load goes down by the rate, the others' goes up."""
    config = TopKRouterConfig(correction_bias=True, bias_update_rate=0.5)
    model, data = tiny_moe(config), rows(EQUAL)
    with trace_routing(model) as contexts:
        train(model, data, tmp_path, gradient_accumulation_steps=2, learning_rate=0.0)

    for key in ("0", "1"):
        index = torch.cat([context.records[key].index.reshape(-1) for context in contexts])
        load = torch.tensor([(index == expert).sum() for expert in range(NUM_EXPERTS)]).float()
        bias = model.model.layers[int(key)].mlp.gate.moe_correction_bias
        torch.testing.assert_close(bias, 0.5 * torch.sign(load.mean() - load))
