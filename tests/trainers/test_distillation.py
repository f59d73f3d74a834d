"""Distillation against a loop over tokens and one step worked out by hand; the teacher is left alone, and left out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hf_moe_ext import MoETrainer, TopKRouterConfig
from hf_moe_ext.trainers.distillation import distillation_loss

from .common import arguments, logged, rows, sgd, snapshot, stock_mixtral, tiny_moe, train


PADDED = [9, 5, 7, 3]
PLAIN = TopKRouterConfig()


def slow_distillation(student, teacher, labels, temperature, shift):
    """Token by token, in float64; (sum, positions)."""
    total, count = 0.0, 0
    for s_row, t_row, l_row in zip(student.double(), teacher.double(), labels, strict=True):
        for place in range(len(l_row)):
            target = place + 1 if shift else place
            if target >= len(l_row) or l_row[target] == -100:
                continue
            p, q = (t_row[place] / temperature).softmax(-1), (s_row[place] / temperature).softmax(-1)
            total += temperature**2 * sum(
                a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True)
            )
            count += 1
    return total, count


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_divergence_from_the_teacher(temperature, shift):
    student, teacher = torch.randn(2, 3, 6, 11)
    labels = torch.randint(11, (3, 6)).masked_fill(torch.rand(3, 6) < 0.4, -100)
    total, count = slow_distillation(student, teacher, labels, temperature, shift)
    found = distillation_loss(student, teacher, labels, temperature=temperature, shift=shift)
    assert found.item() == pytest.approx(total / count, rel=1e-5)


def test_it_is_zero_for_the_teacher_itself_and_without_labels():
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    assert distillation_loss(logits, logits, labels, temperature=2.0, shift=True).item() == pytest.approx(0, abs=1e-7)
    none = torch.full((2, 5), -100)
    assert distillation_loss(logits, -logits, none, temperature=1.0, shift=True).item() == 0


def test_gradients_are_those_by_hand_and_only_the_students():
    """d/ds = T (softmax(s / T) - softmax(t / T)) / n."""
    student = torch.randn(1, 4, 5, requires_grad=True)
    teacher = torch.randn(1, 4, 5, requires_grad=True)
    distillation_loss(student, teacher, torch.zeros(1, 4).long(), temperature=3.0, shift=False).backward()
    expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 4
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


@pytest.mark.parametrize("size", [4, 2, 1], ids=["4x1", "2x2", "1x4"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_step_follows_the_reference(tmp_path, size, smoothing):
    """Weights after a step of plain gradient descent, whatever the micro-batches, and what is logged."""
    data, coef, temperature = rows(PADDED, prompts=[4, 0, 2, 1]), 0.7, 2.0
    model, twin, teacher = tiny_moe(PLAIN), tiny_moe(PLAIN).train(), stock_mixtral(seed=5)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    labels = batch.pop("labels")
    logits = twin(**batch).logits
    used = labels[:, 1:] != -100
    entropy = F.cross_entropy(logits[:, :-1][used], labels[:, 1:][used], label_smoothing=smoothing)
    with torch.no_grad():
        wanted = (teacher.eval()(**batch).logits[:, :-1][used] / temperature).log_softmax(-1)
    found = (logits[:, :-1][used] / temperature).log_softmax(-1)
    distillation = temperature**2 * F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    (entropy + coef * distillation).backward()

    args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **sgd())
    args.distill_coef, args.distill_temperature, args.label_smoothing_factor = coef, temperature, smoothing
    trainer = MoETrainer(model=model, args=args, train_dataset=data, teacher=teacher)
    trainer.train()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        moved = expected[name] if gradient is None else expected[name] - gradient
        torch.testing.assert_close(parameter, moved, atol=2e-5, rtol=1e-5, msg=name)
    line = trainer.state.log_history[0]
    assert line["moe/loss_distillation"] == pytest.approx(distillation.item(), rel=1e-5)
    assert line["moe/lm_loss"] == pytest.approx(entropy.item(), rel=1e-5)
    assert line["loss"] == pytest.approx((entropy + coef * distillation).item(), rel=1e-5)
    assert distillation.item() > 0.1


def test_the_teacher_is_left_alone(tmp_path):
    teacher = stock_mixtral(seed=5).train()
    before = snapshot(teacher)
    trainer = MoETrainer(model=tiny_moe(PLAIN), args=arguments(tmp_path), train_dataset=rows(PADDED), teacher=teacher)
    trainer.train()
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert "loss_distillation" not in str(trainer.evaluate(rows(PADDED)))


def test_after_the_stage_the_teacher_is_not_called_and_training_is_plain(tmp_path):
    """Step 3 on: the gradient is that of the plain loss, from the weights that the teacher led to."""
    calls = []
    teacher = stock_mixtral(seed=5)
    teacher.register_forward_hook(lambda *_: calls.append(1))
    args = arguments(tmp_path / "a", max_steps=5, distill_steps=2)
    trainer = MoETrainer(model=tiny_moe(PLAIN), args=args, train_dataset=rows(PADDED), teacher=teacher)
    trainer.train()
    assert len(calls) == 2 and len(logged(trainer, "moe/loss_distillation")) == 2

    saved = arguments(tmp_path / "b", max_steps=2, save_strategy="steps", save_steps=2, distill_steps=2)
    first = MoETrainer(model=tiny_moe(PLAIN), args=saved, train_dataset=rows(PADDED), teacher=stock_mixtral(seed=5))
    first.train()
    plain = MoETrainer(
        model=tiny_moe(PLAIN, seed=3), args=arguments(tmp_path / "c", max_steps=5), train_dataset=rows(PADDED)
    )
    plain.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, one), other in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("fraction", "steps"), [(0.1, 0), (0.4, 2), (0.5, 2), (0.7, 4), (1.0, 5)])
def test_the_stage_may_be_a_share_of_the_training(tmp_path, fraction, steps):
    args = arguments(tmp_path, max_steps=5, distill_fraction=fraction)
    trainer = MoETrainer(model=tiny_moe(PLAIN), args=args, train_dataset=rows(PADDED), teacher=stock_mixtral(seed=5))
    trainer.train()
    assert len(logged(trainer, "moe/loss_distillation")) == steps


def test_without_weight_the_teacher_changes_nothing(tmp_path):
    data = rows(PADDED)
    args = arguments(tmp_path / "a", max_steps=3, distill_coef=0.0)
    trainer = MoETrainer(model=tiny_moe(PLAIN), args=args, train_dataset=data, teacher=stock_mixtral(seed=5))
    trainer.train()
    plain = train(tiny_moe(PLAIN), data, tmp_path / "b", max_steps=3)
    for one, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_student_comes_closer_to_its_teacher(tmp_path):
    data, teacher = rows(PADDED * 4), stock_mixtral(seed=5)
    args = arguments(tmp_path, max_steps=40, distill_coef=20.0, learning_rate=5e-3)
    trainer = MoETrainer(model=tiny_moe(PLAIN), args=args, train_dataset=data, teacher=teacher)
    trainer.train()
    found = logged(trainer, "moe/loss_distillation")
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distill_coef": -1.0}, "`distill_coef` must be non-negative, got -1.0"),
        ({"distill_temperature": 0.0}, "`distill_temperature` must be positive, got 0.0"),
        ({"distill_steps": 0}, "`distill_steps` must be at least 1, got 0"),
        ({"distill_fraction": 0.0}, "`distill_fraction` must be above 0 and at most 1, got 0.0"),
        ({"distill_fraction": 1.5}, "`distill_fraction` must be above 0 and at most 1, got 1.5"),
        ({"distill_fraction": 0.5, "distill_steps": 3}, "say the same; give one of them"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **values)


def test_bad_teachers_are_refused(tmp_path):
    model = tiny_moe(PLAIN)

    def trainer(teacher):
        return MoETrainer(model=model, args=arguments(tmp_path), train_dataset=rows(PADDED), teacher=teacher)

    with pytest.raises(ValueError, match="the teacher has a vocabulary of 50, the model one of 64"):
        trainer(stock_mixtral(vocab_size=50))
    with pytest.raises(TypeError, match="`teacher` must be a model of Transformers, got Linear"):
        trainer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="it has to be another one"):
        trainer(model)


def test_labels_are_needed(tmp_path):
    data = [{name: value for name, value in row.items() if name != "labels"} for row in rows(PADDED)]
    args = arguments(tmp_path, remove_unused_columns=False)

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().mean()

    trainer = MoETrainer(
        model=tiny_moe(PLAIN), args=args, train_dataset=data, teacher=stock_mixtral(seed=5), compute_loss_func=loss
    )
    with pytest.raises((ValueError, KeyError)):
        trainer.train()
