"""Operations of a step: what PyTorch counts in one, and what the log makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import hf_moe_ext as moe
from hf_moe_ext.modeling.moe_structure import trace_routing
from hf_moe_ext.trainers import freeze_router
from hf_moe_ext.trainers.model_flops import ModelFlops, device_peak
from hf_moe_ext.trainers.routing_metrics import RoutingMetrics

from .common import arguments, rows


def plain(name, extension, **overrides):
    """Without kernels that PyTorch does not count."""
    model = copy.deepcopy(tiny_model(name, attn_implementation="eager", **overrides))
    if name == "opt":
        model = moe.upcycle(model, num_experts=4, router=extension.router, check=False)
    else:
        moe.extend(model, extension)
    model.set_experts_implementation("eager")
    return model.train()


CASES = {
    "top_k": ("mixtral", moe.MoeExtension(router=moe.TopKRouterConfig()), {}),
    "tied": ("mixtral", moe.MoeExtension(router=moe.TopKRouterConfig()), {"tie_word_embeddings": True}),
    "dynamic": ("mixtral", moe.MoeExtension(router=moe.TopPRouterConfig(threshold=0.4)), {}),
    "shared": ("qwen2_moe", moe.MoeExtension(router=moe.TopKRouterConfig(num_experts_per_tok=3)), {}),
    "learned positions, biases": ("opt", moe.MoeExtension(router=moe.TopKRouterConfig()), {}),
    "frozen router": ("mixtral", moe.MoeExtension(router=moe.TopKRouterConfig()), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_that_are_done(case):
    """Exactly, with attention and experts in plain products."""
    name, extension, overrides = CASES[case]
    model = plain(name, extension, **overrides)
    if case == "frozen router":
        freeze_router(model)
    ids = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    metrics = RoutingMetrics()
    with trace_routing(model) as contexts, FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    metrics.update(contexts)
    found = ModelFlops(model).total(ids.numel(), 3 * 7**2, metrics.read())
    done = counter.get_total_flops()
    if case == "dynamic":  # stock experts also compute the slots that are not used, and weigh them with zero
        records = contexts[0].records.values()
        unused = sum(int((record.index >= record.num_experts).sum()) for record in records)
        assert unused > 100
        done -= unused * 6 * 3 * model.config.hidden_size * model.config.intermediate_size
    assert found == pytest.approx(done, rel=1e-9)


def test_layers_without_a_record_cost_nothing_and_all_of_monet_counts():
    config = moe.MonetConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, moe_dim=4,
        moe_heads=2, moe_experts=6, moe_topk=2, moe_groups=2,
    )  # fmt: skip
    flops = ModelFlops(moe.MonetForCausalLM(config))
    assert flops.experts == {} and flops.fixed > 0
    mixtral = ModelFlops(plain("mixtral", moe.MoeExtension(router=moe.TopKRouterConfig())))
    assert (
        set(mixtral.experts) == {"0", "1", "2"} and mixtral.total(5, 25, {}) == 5 * mixtral.fixed + 25 * mixtral.pair
    )


def test_log(tmp_path):
    model = plain("mixtral", moe.MoeExtension(router=moe.TopKRouterConfig()))
    args = arguments(tmp_path, max_steps=2, logging_steps=1, peak_tflops=0.5)
    trainer = moe.MoETrainer(model=model, args=args, train_dataset=rows([9, 5, 9, 7]))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "moe/mfu" in line]
    assert len(lines) == 2
    flops = ModelFlops(model)
    for line in lines:
        assert line["moe/mfu"] == pytest.approx(line["moe/model_tflops"] / 0.5)
        tokens = line["moe/tokens_per_second"] * line["moe/step_time"]
        rate = line["moe/model_tflops"] * 1e12 * line["moe/step_time"]
        assert line["moe/mean_k"] == 2
        low = tokens * (flops.fixed + sum(2 * cost for cost in flops.experts.values()))
        # Rows of 5 to 9 tokens.
        assert low + 5 * tokens * flops.pair <= rate <= low + 9 * tokens * flops.pair


def test_no_peak_and_no_metrics(tmp_path):
    model = plain("mixtral", moe.MoeExtension(router=moe.TopKRouterConfig()))
    for options, expected in (({}, True), ({"routing_metrics": False}, False)):
        args = arguments(tmp_path, max_steps=1, logging_steps=1, **options)
        trainer = moe.MoETrainer(model=model, args=args, train_dataset=rows([9, 5]))
        trainer.train()
        line = trainer.state.log_history[0]
        assert ("moe/model_tflops" in line) == expected and "moe/mfu" not in line
    assert device_peak(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="`peak_tflops` must be positive, got 0.0"):
        arguments(tmp_path, peak_tflops=0.0)


def test_no_series_where_a_decoder_has_tokens_of_its_own(tmp_path):
    model = plain("switch_transformers", moe.MoeExtension(router=moe.TopKRouterConfig()))
    model.config.decoder_start_token_id = 0
    ids = torch.randint(4, 60, (2, 6))
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = moe.MoETrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=data)
    trainer.train()
    line = trainer.state.log_history[0]
    assert "moe/tokens_per_second" in line and "moe/model_tflops" not in line


def test_peaks_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    known = {
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA A100-SXM4-40GB": 312.0,
        "NVIDIA L40S": 362.0,
        "NVIDIA L4": 121.0,
        "GeForce": None,
    }
    for name, peak in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device_peak(torch.device("cuda")) == peak
