"""Training a Monet: its losses, padding, statistics over processes, accumulation in the trainer."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hf_moe_ext as moe
from hf_moe_ext.modeling.moe_structure import auxiliary_losses
from hf_moe_ext.modeling.monet_experts import ambiguity_loss, uniformity_loss

from ..trainers.common import logged, rows, sgd, train
from .test_monet import make, tokens


def losses_by_hand(router_probs, mask):
    """Both losses of the paper, a head and a piece at a time: means over groups of layers."""
    uniformity, ambiguity = [], []
    for group in router_probs:
        evenness, doubt = [], []
        for scores in group:
            real = scores.flatten(0, 1)[mask.flatten()]  # (T, H, S)
            for head in range(real.shape[1]):
                evenness += [-torch.log(real[:, head, piece].mean() + 1e-10) for piece in range(real.shape[2])]
                doubt += [1 - real[token, head].max() for token in range(len(real))]
        uniformity.append(torch.stack(evenness).mean())
        ambiguity.append(torch.stack(doubt).mean())
    return torch.stack(uniformity).mean(), torch.stack(ambiguity).mean()


def language_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def padded():
    """Ids, mask and labels of three texts, some with padding on the left."""
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[2, :5] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_losses_in_training_and_not_in_evaluation():
    model, batch = make(router_aux_loss_coef=0.3).train(), padded()
    out = model(**batch, output_router_probs=True)
    plain = language_loss(out.logits, batch["labels"])
    uniformity, ambiguity = losses_by_hand(out.router_probs, batch["attention_mask"] != 0)
    assert uniformity > math.log(6) and ambiguity > 0.01
    torch.testing.assert_close(out.loss, plain + 0.3 * (uniformity + ambiguity))
    out = model.eval()(**batch)
    torch.testing.assert_close(out.loss, language_loss(out.logits, batch["labels"]))


def test_gradients_of_the_losses():
    raw = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True])

    def both(a, b):
        scores = a.softmax(-1), b.softmax(-1)
        return uniformity_loss(*scores, mask), ambiguity_loss(*scores, mask)

    assert torch.autograd.gradcheck(both, (raw, other))


@pytest.mark.parametrize("name", ["uniformity", "ambiguity"])
def test_each_loss_reaches_both_sides_of_each_router(name):
    model = make().train()
    with moe.trace_routing(model) as contexts:
        model(**padded())
    _, named = auxiliary_losses(contexts)
    named[name].backward()
    for router in model.routers:
        for linear in (router.w1, router.w2):
            assert linear.weight.grad.norm() > 1e-4


def step(model, batch):
    """Loss, gradients and statistics of one training forward."""
    model = copy.deepcopy(model).train()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("garbage", [0, 9])
def test_padding_has_no_part_in_training(garbage):
    model, ids = make(router_aux_loss_coef=0.3), tokens()
    plain = step(model, {"input_ids": ids, "labels": ids})
    batch = {
        "input_ids": F.pad(ids, (4, 0), value=garbage),
        "attention_mask": F.pad(torch.ones_like(ids), (4, 0)),
        # Nothing is predicted from padding: the first token has no label, as without padding.
        "labels": F.pad(ids[:, 1:], (5, 0), value=-100),
    }
    found = step(model, batch)
    torch.testing.assert_close(found[0], plain[0])
    for part, expected in zip(found[1:], plain[1:], strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(part[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("form", ["vertical", "horizontal"])
def test_training_in_bfloat16(form):
    model = make(moe_decompose=form, router_aux_loss_coef=0.3).bfloat16().train()
    model.set_expert_mask(0, [3, 4])
    model(**padded()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all(), name
    assert model.routers[0].norm1.running_mean.dtype == torch.float32
    assert model.routers[0].norm1.running_mean.abs().max() > 0


# --- trainer ---


def test_losses_by_name(tmp_path):
    trainer = train(make(router_aux_loss_coef=0.1), rows([7, 6, 5, 7] * 4), tmp_path, max_steps=24, learning_rate=3e-3)
    losses, lm = logged(trainer, "loss"), logged(trainer, "moe/lm_loss")
    assert sum(losses[-8:]) < sum(losses[:8])
    named = logged(trainer, "moe/loss_uniformity"), logged(trainer, "moe/loss_ambiguity")
    for total, own, uniformity, ambiguity in zip(losses, lm, *named, strict=True):
        assert total == pytest.approx(own + 0.1 * (uniformity + ambiguity), rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("size", [8, 2, 1])
def test_accumulation_counts_every_loss_once(size, smoothing, tmp_path):
    """Eight times the same text: also the statistics of a part are then those of the whole."""
    example = rows([9], seed=3)[0]
    model = make(router_aux_loss_coef=0.3)
    expected = copy.deepcopy(model).train()
    out = expected(example["input_ids"][None], output_router_probs=True)
    logs = out.logits[0, :-1].log_softmax(-1)
    nll = -logs[torch.arange(8), example["labels"][1:]]
    plain = ((1 - smoothing) * nll - smoothing * logs.mean(-1)).mean()
    named = losses_by_hand(out.router_probs, torch.ones(1, 9, dtype=torch.bool))
    (plain + 0.3 * sum(named)).backward()
    wanted = {name: (p - p.grad).detach() for name, p in expected.named_parameters()}
    parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    trainer = train(model, [example] * 8, tmp_path, label_smoothing_factor=smoothing, **sgd(), **parts)
    for key, value in {"lm_loss": plain, "loss_uniformity": named[0], "loss_ambiguity": named[1]}.items():
        assert logged(trainer, f"moe/{key}") == [pytest.approx(value.item(), rel=1e-4)], key
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


# --- processes ---

_TWO_PROCESSES = """
import sys, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hf_moe_ext.modeling.configuration_monet import MonetConfig
from hf_moe_ext.modeling.modeling_monet import MonetForCausalLM
from hf_moe_ext.modeling.monet_experts import MonetBatchNorm

def model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, bos_token_id=None)
    return MonetForCausalLM(
        MonetConfig(
            **sizes, moe_dim=4, moe_heads=2, moe_experts=6, moe_topk=2, initializer_range=0.3, router_aux_loss_coef=0.0
        )
    ).train()

def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    torch.manual_seed(0)
    logits, ids = 2 + torch.randn(10, 3, 5), torch.randint(32, (4, 6))
    # Unequal shares: four and six tokens.
    out, statistics = MonetBatchNorm(3)(logits[:4] if rank == 0 else logits[4:], None)
    both = torch.nn.parallel.DistributedDataParallel(model())
    mine = ids[2 * rank : 2 * rank + 2]
    both(mine, labels=mine).loss.backward()
    dist.barrier()
    dist.destroy_process_group()

    expected, wanted = MonetBatchNorm(3)(logits, None)
    torch.testing.assert_close(out, expected[:4] if rank == 0 else expected[4:])
    torch.testing.assert_close(statistics, wanted)
    whole = model()
    whole(ids, labels=ids).loss.backward()
    for (name, one), two in zip(whole.named_parameters(), both.module.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, one), two in zip(whole.named_buffers(), both.module.buffers(), strict=True):
        torch.testing.assert_close(two, one, msg=name)

if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_two_processes_are_one_batch(tmp_path):
    """Router statistics are those of the whole batch, so gradients and running statistics are."""
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(Path(moe.__file__).parents[1])}
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
