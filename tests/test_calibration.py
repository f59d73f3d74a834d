"""The calibration pass against the model run text by text."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DENSE_NAMES, tiny_inputs, tiny_model

from hf_moe_ext.calibration import CoActivation, GradientImportance, HiddenStates, NeuronMagnitude, calibrate
from hf_moe_ext.modeling.moe_families import get_by_path, get_family, iter_layers
from hf_moe_ext.modeling.moe_structure import dense_linears

from .modeling.test_attention_bam import llama


class Letters:
    def __call__(self, text):
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}


TEXTS = {"a": ["hello world", "more", "a longer text than those"], "b": ["other words"]}


def by_hand(model, texts, gradients=False):
    """Hidden states, neurons and gradients of each layer, token by token, one text at a time."""
    found = {}
    for text in texts:
        ids = torch.tensor([Letters()(text)["input_ids"]])
        states, handles = {}, []
        for number, layer in enumerate(model.model.layers):

            def save(_, args, key=str(number), states=states):
                states[key + "h"] = args[0].detach()

            def keep(_, args, key=str(number), states=states):
                value = args[0].requires_grad_() if not args[0].requires_grad else args[0]
                value.retain_grad()
                states[key] = value
                return (value,)

            handles.append(layer.mlp.register_forward_pre_hook(save))
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(keep))
        out = model(ids, labels=ids)
        (out.loss * (ids.shape[1] - 1)).backward()
        for handle in handles:
            handle.remove()
        for number in range(len(model.model.layers)):
            key = str(number)
            row = (states[key + "h"][0], states[key].detach()[0], states[key].grad[0])
            found.setdefault(key, []).append(row)
    return {key: [torch.cat(parts) for parts in zip(*rows, strict=True)] for key, rows in found.items()}


def test_collectors_against_single_texts():
    model = llama().train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    neurons, importance, states, together = NeuronMagnitude(), GradientImportance(), HiddenStates(), CoActivation()
    count = calibrate(model, TEXTS, [neurons, importance, states, together], tokenizer=Letters(), batch_size=2)
    assert count == sum(len(text) for texts in TEXTS.values() for text in texts)
    assert model.training and flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    for domain, texts in TEXTS.items():
        for key, (_, active, gradient) in by_hand(model, texts).items():
            expected = active.double().abs().mean(0)
            torch.testing.assert_close(neurons.means[domain][key], expected, rtol=1e-4, atol=1e-6)
            expected = (active.double() * gradient.double()).abs().mean(0)
            torch.testing.assert_close(importance.means[domain][key], expected, rtol=1e-3, atol=1e-7)
    for key, (hidden, active, _) in by_hand(model, [text for texts in TEXTS.values() for text in texts]).items():
        # In batches, texts are padded on the right; rows come text by text all the same.
        torch.testing.assert_close(states.rows[key], hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.rows[key], active.abs(), rtol=1e-4, atol=1e-5)


def test_samples_are_bounded_and_spread():
    states = HiddenStates(size=8)
    for start in range(0, 1000, 10):
        states.add("0", "all", torch.arange(start, start + 10.0)[:, None], torch.zeros(10, 1), None)
    rows = states.rows["0"].flatten()
    assert 8 <= len(rows) <= 16 and rows[0] == 0 and rows[-1] > 850
    assert (rows.diff() == rows.diff()[0]).all()


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_every_family(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    if "input_ids" not in inputs:
        pytest.skip("a vision model: there are no tokens")
    neurons = NeuronMagnitude()
    calibrate(model, [{"input_ids": inputs["input_ids"]}], [neurons])
    family = get_family(name)
    for key, layer, _ in iter_layers(model, family):
        down = dense_linears(layer, family.dense)["down"].weight
        width = down.shape[0] if family.dense.transposed else down.shape[1]
        assert neurons.means["all"][key].shape == (width,)
        assert get_by_path(layer, family.dense.site) is not None


def test_limits_and_bad_input():
    model = llama()
    assert (
        calibrate(model, ["abcdef"] * 10, [NeuronMagnitude()], tokenizer=Letters(), batch_size=1, max_tokens=13) == 18
    )
    assert calibrate(model, ["abcdef"], [NeuronMagnitude()], tokenizer=Letters(), max_length=4) == 4
    for arguments, error, text in (
        (({},), ValueError, "is empty"),
        (([""],), ValueError, "has no tokens"),
        (([3],), TypeError, "expected a text or `input_ids`, got int"),
    ):
        with pytest.raises(error, match=text):
            calibrate(model, *arguments, [NeuronMagnitude()], tokenizer=Letters())
    with pytest.raises(ValueError, match="texts need `tokenizer"):
        calibrate(model, ["a"], [NeuronMagnitude()])
    with pytest.raises(ValueError, match="no dense model"):
        calibrate(tiny_model("mixtral"), ["a"], [NeuronMagnitude()], tokenizer=Letters())
    with pytest.raises(ValueError, match="no language-modelling head"):
        calibrate(model.model, ["abc"], [GradientImportance()], tokenizer=Letters())

    class Failing(NeuronMagnitude):
        def add(self, *args):
            raise RuntimeError("stop")

    model.train()
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model, ["abc"], [Failing()], tokenizer=Letters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
