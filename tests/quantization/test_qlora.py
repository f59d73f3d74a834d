"""Adapters of PEFT on models with experts in few bits, against the same adapters on the plain numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny_models import tiny_inputs, tiny_model

import hf_moe_ext as moe
from hf_moe_ext import MoeQuantizationConfig
from hf_moe_ext.kernels import quantized_experts
from hf_moe_ext.kernels.lora import keep_factors
from hf_moe_ext.kernels.quantized_tensor import QuantizedTensor

from .test_quantizer import FORMATS, fresh, ids


# PEFT asks for `is_gradient_checkpointing`, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)


def adapted(model, *, keep=True):
    model = get_peft_model(model, copy.deepcopy(CONFIG))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if keep:
        keep_factors(model)
    return model


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """How often experts ran with their adapters apart."""
    seen, run = [], quantized_experts.run_quantized_lora
    monkeypatch.setattr(
        quantized_experts, "run_quantized_lora", lambda *args: seen.append(args[0].dtype) or run(*args)
    )
    return seen


@pytest.mark.parametrize("keep", [True, False], ids=["factors", "stock-peft"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "linear"])
def test_gradients_are_those_on_the_plain_numbers(name, keep, calls):
    found = loss_and_gradients(adapted(moe.quantize(fresh(), FORMATS[name]), keep=keep))
    assert len(calls) == 2  # one for each layer
    plain = moe.quantize(fresh(), FORMATS[name]).dequantize()
    expected = loss_and_gradients(adapted(plain.requires_grad_(False)))
    assert len(calls) == 2
    assert found[1].keys() == expected[1].keys() and all("lora_" in key for key in found[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_families_with_other_layouts(calls):
    for name in ("gpt_oss", "nemotron_h", "qwen3_moe"):
        up = "up_proj" if name == "nemotron_h" else "gate_up_proj"
        config = LoraConfig(r=2, target_parameters=[f"experts.{up}", "experts.down_proj"])

        def build(quantized, name=name, config=config):
            model = moe.quantize(tiny_model(name), MoeQuantizationConfig("int8"))
            model = get_peft_model(model if quantized else model.dequantize(), copy.deepcopy(config))
            generator = torch.Generator().manual_seed(3)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            keep_factors(model)
            return model

        calls.clear()
        with torch.no_grad():
            outputs = [build(quantized)(**tiny_inputs(name)).logits for quantized in (True, False)]
        assert calls
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_other_implementations(implementation):
    model = adapted(moe.quantize(fresh()))
    expected = loss_and_gradients(model)
    model.base_model.model.set_experts_implementation(implementation)
    torch.testing.assert_close(loss_and_gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_autocast(calls):
    model = adapted(moe.quantize(fresh(), FORMATS["both"]))
    exact, gradients = loss_and_gradients(model)
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = loss_and_gradients(model)
    assert calls == [torch.bfloat16] * 2
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for name, gradient in gradients.items():
        assert found[name].dtype == torch.float32
        assert torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_leaves_the_base(checkpointing, tmp_path):
    torch.manual_seed(0)
    base = prepare_model_for_kbit_training(
        moe.quantize(fresh().to(torch.bfloat16), FORMATS["both"]), use_gradient_checkpointing=checkpointing
    )
    model = get_peft_model(base, copy.deepcopy(CONFIG))
    keep_factors(model)
    frozen = {
        name: [part.clone() for part in p.parts().values()] if isinstance(p, QuantizedTensor) else p.detach().clone()
        for name, p in model.named_parameters()
        if not p.requires_grad
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model.train()(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(p, old) for p, old in zip(trained, start, strict=True))
    for name, p in model.named_parameters():
        if isinstance(p, QuantizedTensor):
            assert all(torch.equal(a, b) for a, b in zip(p.parts().values(), frozen[name], strict=True)), name
        elif name in frozen:
            assert torch.equal(p, frozen[name]), name

    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
        again = prepare_model_for_kbit_training(moe.quantize(fresh().to(torch.bfloat16), FORMATS["both"]))
        loaded = PeftModel.from_pretrained(again, tmp_path).eval()
        assert torch.equal(loaded(input_ids=ids()).logits, expected)


def test_merging_is_refused_and_works_on_the_plain_numbers(tmp_path):
    model = adapted(moe.quantize(fresh(), FORMATS["nf4"])).eval()
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"To merge an adapter or to train them, call `model.dequantize\(\)` first"):
        model.merge_and_unload()
    model = PeftModel.from_pretrained(moe.quantize(fresh(), FORMATS["nf4"]), tmp_path)
    model.get_base_model().dequantize()
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)


def test_without_adapters_the_trainer_refuses(tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(moe.quantize(fresh()), arguments)
    Trainer(adapted(moe.quantize(fresh())), arguments)
