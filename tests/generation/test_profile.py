"""The distance of weak branches, against two models that each run alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from hf_moe_ext.generation import contrast_profile
from tests.generation.references import weak_mixtral
from tests.generation.test_self_contrast import assert_same, random_ids, snapshot


def gates_of(model, ids, mask):
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, a, out: seen.append(out[2])) for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    for hook in hooks:
        hook.remove()
    return logits.double().log_softmax(-1), seen


def test_profile():
    model, ids = tiny_model("mixtral"), random_ids(3)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    before = snapshot(model)
    found = contrast_profile(model, ids, range(1, 9), attention_mask=mask)
    assert_same(snapshot(model), before)
    strong, chosen = gates_of(model, ids, mask)
    for profile in found:
        weak, others = gates_of(weak_mixtral(model, rank=profile.k), ids, mask)
        total, outside, equal, count = 0.0, 0, 0, 0
        for row in range(3):
            for place in range(ids.shape[1]):
                if not mask[row, place]:
                    continue
                count += 1
                p, q = strong[row, place], weak[row, place]
                total += float((p.exp() * (p - q)).sum())
                equal += int(p.argmax() == q.argmax())
                for mine, other in zip(chosen, others, strict=True):
                    token = row * ids.shape[1] + place
                    outside += int(other[token, 0] not in mine[token])
        assert profile.divergence == pytest.approx(total / count, rel=1e-4, abs=1e-5)
        assert profile.outside == pytest.approx(outside / count / 3, abs=1e-6)
        assert profile.agreement == pytest.approx(equal / count, abs=1e-6)
    assert found[7].outside > 0.7 > found[0].outside


def test_a_rank_that_no_layer_has():
    with pytest.raises(ValueError, match="9"):
        contrast_profile(tiny_model("mixtral"), random_ids(1), [9])
