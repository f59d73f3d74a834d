"""An experts module read into tensors and a formula: every stock family, and what must not be recognised."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tiny_models import MOE_NAMES, tiny_model
from torch import nn

from hf_moe_ext.kernels.expert_weights import Activation, find_activation, read_experts
from hf_moe_ext.modeling.moe_experts import MoeExtExperts


SWIGLU = Activation()
CLAMPED = Activation("silu", 1.702, 7.0, 1.0)
# What differs from a plain SwiGLU, and what has experts of another form.
KNOWN = {
    "gpt_oss": CLAMPED,
    "minimax_m3_vl": CLAMPED,
    "openai_privacy_filter": CLAMPED,
    "deepseek_v4": Activation(limit=10.0),
    "glm5_next": Activation(limit=10.0),
    "hy_v4": Activation(limit=10.0),
    "gemma4": Activation("gelu_tanh"),
    "nemotron_h": Activation("relu2"),
    "inkling2": None,  # soft caps
}
OWN_FORM = ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers")


@functools.cache
def experts_of(name: str) -> nn.Module:
    model = tiny_model(name)
    return next(m for m in model.modules() if hasattr(m, "is_concatenated") and hasattr(m, "down_proj"))


@pytest.mark.parametrize("name", [name for name in MOE_NAMES if name not in OWN_FORM])
def test_stock_families(name):
    experts = experts_of(name)
    found = read_experts(experts)
    assert found.activation == KNOWN.get(name, SWIGLU)
    assert found.up is (experts.gate_up_proj if experts.has_gate else experts.up_proj)
    assert found.down is experts.down_proj and (found.up_bias is None) == (not experts.has_bias)
    assert (found.post_norm is not None) == (name == "muse_spark")
    shape = (found.num_experts, found.hidden_size, found.intermediate_size)
    assert shape == (experts.num_experts, *sizes(experts))
    rows = torch.randn(5, (2 if found.has_gate else 1) * found.intermediate_size)
    if found.activation is not None and found.layout is not None:
        again = type(found).from_layout(found.layout, found.up, found.down, found.up_bias, found.down_bias)
        torch.testing.assert_close(again.apply(rows), found.apply(rows))


def sizes(experts: nn.Module) -> tuple[int, int]:
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    hidden, rows = (up.shape[1], up.shape[2]) if experts.is_transposed else (up.shape[2], up.shape[1])
    return hidden, rows // (2 if experts.has_gate else 1)


def made(activation: nn.Module, has_gate: bool = True, dropout: nn.Module | None = None) -> MoeExtExperts:
    return MoeExtExperts(None, 2, 4, 6, activation=activation, has_gate=has_gate, dropout=dropout)


class Almost(nn.Module):
    """SiLU but for large numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x).clamp(max=900.0)


class Single(nn.Module):
    """SiLU in single precision, as some families compute it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x.float()).to(x.dtype)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.SiLU(), SWIGLU),
        (Single(), SWIGLU),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU("tanh"), Activation("gelu_tanh")),
        (nn.ReLU(), Activation("relu")),
        (nn.Tanh(), None),
        (nn.PReLU(), None),
        (nn.LeakyReLU(0.0), Activation("relu")),
        (Almost(), None),
        (nn.Sequential(nn.SiLU(), nn.Dropout(0.5)), None),
    ],
)
@pytest.mark.parametrize("has_gate", [True, False])
def test_activations_are_recognised_by_what_they_compute(activation, expected, has_gate):
    assert find_activation(made(activation, has_gate)) == expected


def test_functions_that_only_ungated_experts_have():
    class Square(nn.Module):
        def forward(self, x):
            return x.relu().square()

    assert find_activation(made(Square(), has_gate=False)) == Activation("relu2")
    assert find_activation(made(nn.Identity(), has_gate=False)) == Activation("identity")
    assert find_activation(made(Square())) is None


@pytest.mark.parametrize("limit", [None, 0.5, 7.0, 1e4])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.702])
@pytest.mark.parametrize("shift", [0.0, 1.0, -0.25])
@pytest.mark.parametrize("interleaved", [False, True])
def test_parameters_of_a_gate_of_its_own(limit, alpha, shift, interleaved):
    formula = Activation("silu", alpha, limit, shift)

    class Own(MoeExtExperts):
        def _apply_gate(self, rows):
            gate, up = (rows[..., ::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
            return formula.glu(gate, up)

    experts = Own(None, 2, 4, 6, activation=nn.SiLU())
    experts.is_concatenated = not interleaved
    assert find_activation(experts) == formula
    experts.is_concatenated = interleaved  # the weights are said to lie otherwise than the gate reads them
    assert find_activation(experts) != formula


def test_a_gate_that_refuses_plain_numbers_is_not_known():
    class Own(MoeExtExperts):
        def _apply_gate(self, rows):
            raise TypeError("four bits only")

    assert find_activation(Own(None, 2, 4, 6, activation=nn.SiLU())) is None


def test_the_answer_is_kept_until_the_activation_changes(monkeypatch):
    experts = made(nn.SiLU())
    assert read_experts(experts).activation == SWIGLU
    calls = []
    monkeypatch.setattr(
        "hf_moe_ext.kernels.expert_weights.find_activation", lambda module: calls.append(module) or None
    )
    assert read_experts(experts).activation == SWIGLU and not calls
    experts.act_fn = nn.GELU()
    assert read_experts(experts).activation is None and len(calls) == 1
    twin = copy.deepcopy(experts)
    assert read_experts(twin).activation is None
    assert vars(twin).keys() == vars(made(nn.GELU())).keys()  # nothing is left on the module


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_formula_is_what_it_says(shift):
    gate, up = torch.randn(2, 64, dtype=torch.float64) * 3
    found = Activation("silu", 1.5, 2.0, shift).glu(gate, up)
    for g, u, value in zip(gate.tolist(), up.tolist(), found.tolist(), strict=True):
        g, u = min(g, 2.0), max(-2.0, min(u, 2.0))
        assert value == pytest.approx(g / (1 + 2.718281828459045 ** (-1.5 * g)) * (u + shift))
