"""Every family record against the stock source it describes."""

import copy
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moe_ext.modeling.moe_families import (
    FAMILIES,
    DenseSpec,
    MoeSpec,
    get_by_path,
    get_family,
    has_path,
    iter_layers,
    list_families,
    set_by_path,
)
from tests.tiny_models import DENSE_NAMES, MOE_NAMES, tiny_config, tiny_inputs, tiny_model


TINY_EXPERTS = 8
# Gates with more outputs than experts: identity experts, a skip class.
EXTRA_CLASSES = {"longcat_flash": 2, "zaya": 1}
# Gates that also score the shared expert, in a row that is not among the logits.
EXTRA_ROWS = {"inkling_mm_model": 1}


@lru_cache(maxsize=1)
def moe_layers(name: str) -> tuple[list[tuple[nn.Module, nn.Module, nn.Module]], MoeSpec, PreTrainedConfig]:
    """(block, gate, experts) of every MoE layer of the tiny model, the record, and the config its keys refer to."""
    family = get_family(name)
    found = []
    for _, layer, base in iter_layers(tiny_model(name), family):
        if has_path(layer, family.moe.block):
            block = get_by_path(layer, family.moe.block)
            if has_path(block, family.moe.router) and has_path(block, family.moe.experts):
                found.append((block, get_by_path(block, family.moe.router), get_by_path(block, family.moe.experts)))
                config = base.config
    return found, family.moe, config


def run_gate(spec: MoeSpec, block: nn.Module, gate: nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stock gate's outputs by letter, for (tokens, hidden) input."""
    returns = spec.returns
    for version, order in spec.returns_before:
        if Version(transformers.__version__) < Version(version):
            returns = order
            break
    args = (get_by_path(block, spec.block_bias),) if spec.bias == "arg" else ()
    with torch.no_grad():
        outputs = gate(hidden[None] if spec.input_3d else hidden, *args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == len(returns)
    return dict(zip(returns, outputs, strict=True))


def reference_gate(
    spec: MoeSpec, config: PreTrainedConfig, block: nn.Module, gate: nn.Module, logits: torch.Tensor
) -> list[dict[int, float]]:
    """The record's rule, one token at a time: a map from expert to weight for each."""

    def value(entry: Any) -> Any:
        return get_by_path(config, entry) if isinstance(entry, str) else entry

    k = get_by_path(config, spec.top_k)
    bias = torch.zeros(logits.shape[1])
    if spec.bias is not None:
        found = get_by_path(block, spec.block_bias) if spec.bias == "arg" else get_by_path(gate, spec.bias)
        bias = found.detach().float().reshape(-1)
        assert bias.abs().max() > 0
    groups = None
    if spec.groups is not None and value(spec.groups[0]) is not None:
        groups = (value(spec.groups[0]), value(spec.groups[1]), spec.groups[2])
    routes = []
    for row in logits.double():
        scores = row.softmax(-1) if spec.score == "softmax" else row.sigmoid()
        choice = scores + bias
        if groups is not None:
            members = choice.reshape(groups[0], -1)
            rated = [m.topk(2).values.sum() if groups[2] == "top2_sum" else m.max() for m in members]
            best = sorted(range(groups[0]), key=lambda group: -rated[group])[: groups[1]]
            for group in range(groups[0]):
                if group not in best:
                    members[group] = float("-inf")
            choice = members.reshape(-1)
        chosen = sorted(range(len(choice)), key=lambda expert: -choice[expert])[:k]
        if spec.order == "topk_score":
            weights = row[chosen].softmax(-1)
        else:
            weights = scores[chosen]
            if value(spec.renormalize):
                weights = weights / weights.sum()
        weights = weights * value(spec.scale)
        if spec.expert_scale is not None:
            weights = weights * get_by_path(gate, spec.expert_scale)[chosen]
        routes.append(dict(zip(chosen, weights.tolist(), strict=True)))
    return routes


@pytest.mark.parametrize("name", MOE_NAMES)
def test_moe_paths_and_counts(name: str) -> None:
    layers, spec, config = moe_layers(name)
    assert layers
    num_experts = sum(get_by_path(config, key) for key in spec.num_experts.split("+"))
    assert num_experts == (TINY_EXPERTS if name == "zaya" else TINY_EXPERTS + EXTRA_CLASSES.get(name, 0))
    if spec.top_k:
        top_k = get_by_path(config, spec.top_k)
        assert top_k == (1 if name == "zaya" else 2)
    width = get_by_path(config, spec.intermediate_size)
    for block, gate, experts in layers:
        for path in spec.shared:
            assert isinstance(get_by_path(block, path), nn.Module)
        rows = TINY_EXPERTS + EXTRA_CLASSES.get(name, 0) + EXTRA_ROWS.get(name, 0)
        assert any(parameter.dim() == 2 and parameter.shape[0] == rows for parameter in gate.parameters())
        count = getattr(experts, "num_experts", None) or getattr(experts, "num_routed_experts", None)
        assert (len(experts) if count is None else count) == TINY_EXPERTS
        sizes = {size for parameter in experts.parameters() for size in parameter.shape}
        assert width in sizes or width * TINY_EXPERTS in sizes or 2 * width in sizes
        if spec.block_bias is not None:
            assert get_by_path(block, spec.block_bias).shape[-1] == TINY_EXPERTS


@pytest.mark.parametrize("name", MOE_NAMES)
def test_gate_rule(name: str) -> None:
    layers, spec, stock_config = moe_layers(name)
    if spec.score == "custom":
        pytest.skip("the record names no rule (`score='custom'`)")
    if "W" not in spec.returns:
        pytest.skip(f"the gate does not choose; the adapter `{spec.adapter}` does")
    block, gate, _ = layers[-1]
    hidden = torch.randn(12, stock_config.hidden_size)
    for renormalize in (True, False) if isinstance(spec.renormalize, str) else (spec.renormalize,):
        config, gate = copy.deepcopy(stock_config), copy.deepcopy(gate)
        if isinstance(spec.renormalize, str):
            assert getattr(gate, spec.renormalize) is True or not renormalize
            setattr(config, spec.renormalize, renormalize)
            setattr(gate, spec.renormalize, renormalize)
        out = run_gate(spec, block, gate, hidden)
        logits = out["L"].float() if "L" in out else out["P"].log()
        routes = reference_gate(spec, config, block, gate, logits)
        for index, weights, expected in zip(out["I"], out["W"], routes, strict=True):
            found = dict(zip(index.tolist(), weights.tolist(), strict=True))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", MOE_NAMES)
def test_gate_logits(name: str) -> None:
    layers, spec, config = moe_layers(name)
    block, gate, _ = layers[-1]
    hidden = torch.randn(12, config.hidden_size)
    if "L" not in spec.returns and "P" not in spec.returns:
        pytest.skip(f"the gate is read by the adapter `{spec.adapter}`")
    out = run_gate(spec, block, gate, hidden)
    if "W" in out:
        assert out["I"].shape == out["W"].shape == (12, get_by_path(config, spec.top_k))
        assert out["I"].dtype == torch.int64
    raw = out["L"] if "L" in out else out["P"]
    assert raw.shape == (12, TINY_EXPERTS + EXTRA_CLASSES.get(name, 0))
    if spec.logits == "stock":
        return
    for dtype in (torch.float32, torch.bfloat16):
        gate_copy = copy.deepcopy(gate)
        if name != "inkling2":  # its gate stays in float32
            gate_copy.to(dtype)
        x = hidden.to(dtype)
        stock = run_gate(spec, block, gate_copy, x)["L"]
        weight = (gate_copy.layer if spec.logits == "layer" else gate_copy).weight
        exact = spec.logits == "linear_fp32"
        ours = F.linear(x.float(), weight.float()) if exact else F.linear(x, weight)
        assert torch.equal(stock.float(), ours.float())


class ReferenceMLP(nn.Module):
    """A dense block computed from its record."""

    def __init__(self, layer: nn.Module, spec: DenseSpec):
        super().__init__()
        self.transposed = spec.transposed
        self.act = get_by_path(layer, spec.activation)
        self.down = get_by_path(layer, spec.down)
        self.up, self.gate, self.fused = get_by_path(layer, spec.up), None, spec.fused is not None
        if spec.gate is not None and has_path(layer, spec.gate):
            self.gate = get_by_path(layer, spec.gate)

    def project(self, linear: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        weight = linear.weight.T if self.transposed else linear.weight
        return F.linear(hidden, weight, linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.fused:
            gate, up = self.project(self.up, hidden).chunk(2, dim=-1)
            inner = self.act(gate) * up
        elif self.gate is not None:
            inner = self.act(self.project(self.gate, hidden)) * self.project(self.up, hidden)
        else:
            inner = self.act(self.project(self.up, hidden))
        return self.project(self.down, inner)


@pytest.mark.parametrize("name", (*DENSE_NAMES, "t5-gated"))
def test_dense_block(name: str) -> None:
    name, _, variant = name.partition("-")
    overrides = {"feed_forward_proj": "gated-gelu"} if variant else {}
    family, model, inputs = get_family(name), tiny_model(name, **overrides), tiny_inputs(name)
    spec = family.dense
    with torch.no_grad():
        stock = model(**inputs).logits
    layers = [layer for _, layer, _ in iter_layers(model, family)]
    assert len(layers) == (4 if family.name == "t5" else 3)
    for layer in layers:
        if spec.dropout is not None:
            assert isinstance(get_by_path(layer, spec.dropout), (nn.Dropout, float))
        site = get_by_path(layer, spec.site)
        if not spec.bypass:
            inside = {id(module) for module in site.modules()}
            assert id(get_by_path(layer, spec.up)) in inside and id(get_by_path(layer, spec.down)) in inside
        reference = ReferenceMLP(layer, spec)
        assert (reference.gate is not None) == (spec.gate is not None and family.name != "t5" or bool(variant))
        set_by_path(layer, spec.site, reference)
        for path in spec.bypass:
            set_by_path(layer, path, nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-5, atol=1e-5)


# What the config of the stock MoE family says besides the dense model's values and the counts.
STOCK_MOE_CONFIG: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"expert_selection_fn": "softmax", "num_shared_experts": 0},
    "ernie4_5_moe": {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": -1},
    "flex_olmo": {"norm_topk_prob": True},
    "qwen2_moe": {"norm_topk_prob": True, "shared_expert_intermediate_size": 0},
    "qwen3_moe": {"norm_topk_prob": True},
}
STOCK_MOE_VARIANTS = [
    ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "max_window_layers": 0}),
    ("olmo2", {"attention_bias": True}),
    ("granite", {"attention_bias": True, "attention_multiplier": 0.3, "residual_multiplier": 0.4}),
    ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "tie_word_embeddings": True}),
    ("cohere2", {"attention_bias": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("ernie4_5", {"tie_word_embeddings": False}),
]
STOCK_MOE = [(family.name, {}) for family in list_families() if family.stock_moe is not None] + STOCK_MOE_VARIANTS


@pytest.mark.parametrize(("name", "overrides"), STOCK_MOE, ids=["-".join((n, *o)) for n, o in STOCK_MOE])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_stock_moe(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """A dense model with every expert a copy of its block is, in the stock MoE architecture, the same function."""
    dense_family, dense = get_family(name), tiny_model(name, **overrides)
    family = get_family(dense_family.stock_moe)
    spec, config_class = family.moe, CONFIG_MAPPING[family.name]
    values = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    values |= {spec.num_experts: 4, spec.top_k: 2, spec.intermediate_size: dense.config.intermediate_size}
    moe = AutoModelForCausalLM.from_config(config_class(**values | STOCK_MOE_CONFIG.get(family.name, {})))

    missing, unexpected = moe.load_state_dict(dense.state_dict(), strict=False)
    site = dense_family.dense.site
    assert all(f".{site}." in key for key in unexpected)
    assert all(f".{spec.block}." in key for key in missing)
    for (_, target, _), (_, source, _) in zip(iter_layers(moe, family), iter_layers(dense, dense_family), strict=True):
        block = get_by_path(target, spec.block)
        experts, linears = get_by_path(block, spec.experts), get_by_path(source, site)
        gate_up = torch.cat([linears.gate_proj.weight, linears.up_proj.weight])
        with torch.no_grad():
            get_by_path(block, spec.router).weight.normal_()
            experts.gate_up_proj.copy_(gate_up.expand(4, -1, -1))
            experts.down_proj.copy_(linears.down_proj.weight.expand(4, -1, -1))
    moe.save_pretrained(tmp_path)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours, expected = moe(**tiny_inputs(name)).logits, dense(**tiny_inputs(name)).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_names_are_unique() -> None:
    names = Counter(key for family in FAMILIES for key in (family.name, *family.aliases))
    assert max(names.values()) == 1


def test_records_are_consistent() -> None:
    for family in FAMILIES:
        assert (family.moe is None) != (family.dense is None)
        assert family.stock_moe is None or get_family(family.stock_moe).moe is not None
        if family.moe is not None:
            assert (family.moe.bias == "arg") == (family.moe.block_bias is not None)
            assert family.moe.returns or family.moe.adapter


@pytest.mark.parametrize("name", [family.name for family in list_families()])
def test_tiny_model(name: str) -> None:
    first, second = tiny_model(name), tiny_model(name)
    with torch.no_grad():
        logits = first(**tiny_inputs(name)).logits
        assert logits.isfinite().all() and logits.std() > 0.02
        assert torch.equal(logits, second(**tiny_inputs(name)).logits)
    assert get_family(tiny_config(name).model_type) is get_family(name)
