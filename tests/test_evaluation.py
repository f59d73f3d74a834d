"""Perplexity against a loop over single predictions and against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_moe_ext as moe
from hf_moe_ext import evaluation
from hf_moe_ext.evaluation import PerplexityResult, perplexity


VOCAB = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def _reference(model, windows) -> tuple[float, int]:
    """One prefix at a time, probabilities in float64."""
    model.eval()
    nats = []
    for window in windows:
        ids = torch.as_tensor(window["input_ids"])
        mask = torch.as_tensor(window.get("attention_mask", [1] * len(ids)))
        labels = torch.as_tensor(window.get("labels", window["input_ids"]))
        real = mask.nonzero().flatten().tolist()
        for first, position in enumerate(real[1:], start=1):
            if labels[position] == -100:
                continue
            prefix = ids[real[:first]][None]
            probabilities = model(input_ids=prefix).logits[0, -1].double().softmax(-1)
            nats.append(-math.log(probabilities[labels[position]].item()))
    return sum(nats) / len(nats), len(nats)


def _windows(*lengths: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(VOCAB, (length,), generator=generator)} for length in lengths]


def _left_padded() -> list[dict]:
    windows = _windows(7, 7, 7)
    masks = ([0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 1, 1])
    return [{**window, "attention_mask": torch.tensor(mask)} for window, mask in zip(windows, masks, strict=True)]


def _right_padded() -> list[dict]:
    windows = _windows(6, 6)
    return [{**windows[0], "attention_mask": torch.tensor([1, 1, 1, 0, 0, 0])}, windows[1]]


def _masked_labels() -> list[dict]:
    windows = _windows(6, 6)
    for window in windows:
        window["labels"] = window["input_ids"].clone()
        window["labels"][:4] = -100
    return windows


CASES = {
    "equal": lambda: _windows(9, 9, 9, 9, 9),
    "lengths": lambda: _windows(3, 11, 2, 1, 7),
    "lists": lambda: [{"input_ids": window["input_ids"].tolist()} for window in _windows(5, 8)],
    "left_padding": _left_padded,
    "right_padding": _right_padded,
    "labels": _masked_labels,
}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_prefix_at_a_time(model, case, batch_size):
    windows = CASES[case]()
    nats, tokens = _reference(model, windows)
    result = perplexity(model, windows, batch_size=batch_size)
    assert result.tokens == tokens
    assert result.nats == pytest.approx(nats, abs=2e-5)
    assert result.perplexity == pytest.approx(math.exp(nats), rel=1e-4)
    assert result.mean_k is None
    assert result.tokens_per_second > 0


def test_tensor_and_dataset(model):
    datasets = pytest.importorskip("datasets")
    windows = _windows(8, 8, 8)
    ids = torch.stack([window["input_ids"] for window in windows])
    expected = perplexity(model, windows).nats
    assert perplexity(model, ids).nats == expected
    assert perplexity(model, datasets.Dataset.from_dict({"input_ids": ids.tolist()})).nats == expected


def test_slices_do_not_change_the_result(model, monkeypatch):
    windows = _windows(9, 9, 9)
    expected = perplexity(model, windows).nats
    monkeypatch.setattr(evaluation, "_SLICE", 4 * VOCAB)
    assert perplexity(model, windows).nats == pytest.approx(expected, abs=1e-6)


class _Given(nn.Module):
    """Returns fixed logits and a loss that must not be used."""

    device = torch.device("cpu")

    def __init__(self, logits) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, **kwargs):
        assert "labels" not in kwargs
        return SimpleNamespace(loss=torch.tensor(99.0), logits=self.logits(input_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uniform_logits_give_the_logarithm_of_the_vocabulary(dtype):
    model = _Given(lambda ids: torch.full((*ids.shape, VOCAB), 3.0, dtype=dtype))
    result = perplexity(model, _windows(10, 10), batch_size=1)
    assert result.nats == pytest.approx(math.log(VOCAB), abs=1e-6)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert result.tokens == 18


def test_a_model_that_knows_the_next_token_has_perplexity_one():
    model = _Given(lambda ids: 100.0 * nn.functional.one_hot(ids.roll(-1, dims=1), VOCAB).float())
    assert perplexity(model, _windows(10)).perplexity == pytest.approx(1.0)


def test_hopeless_models_do_not_overflow():
    assert PerplexityResult(nats=1e4, tokens=1, seconds=1.0).perplexity == math.inf
    assert math.isnan(PerplexityResult(nats=math.nan, tokens=1, seconds=1.0).perplexity)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_modes_are_restored(model, fails):
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    if fails:
        with pytest.raises(IndexError):
            perplexity(model, torch.full((1, 4), VOCAB))
    else:
        assert perplexity(model, _windows(6)).nats == perplexity(model, _windows(6)).nats  # dropout is off
    assert {name: module.training for name, module in model.named_modules()} == before


class _Keeps(nn.Module):
    """Keeps a table from its first call, as some position embeddings and dequantised weights do."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, VOCAB)
        self.table = None

    def forward(self, input_ids, **kwargs):
        if self.table is None:
            self.table = torch.linspace(0.0, 1.0, VOCAB)
        return SimpleNamespace(logits=self.embedding(input_ids) * self.table)


def test_training_goes_on_afterwards():
    model = _Keeps()
    perplexity(model, _windows(6))
    model(_windows(6)[0]["input_ids"][None]).logits.sum().backward()
    assert model.embedding.weight.grad is not None


def test_mean_k_of_an_extended_model_counts_real_tokens():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    mixture = MixtralForCausalLM(config)
    assert perplexity(mixture, _windows(6)).mean_k is None
    moe.extend(mixture, moe.MoeExtension(router=moe.TopPRouterConfig(threshold=0.6)))
    apart = [perplexity(mixture, [window]).mean_k for window in _windows(6, 6, 3)]
    assert all(1 <= mean_k <= 4 for mean_k in apart)
    together = perplexity(mixture, _windows(6, 6, 3), batch_size=2).mean_k
    assert together == pytest.approx((6 * apart[0] + 6 * apart[1] + 3 * apart[2]) / 15, abs=1e-6)


@pytest.mark.parametrize(
    ("windows", "kwargs", "error", "message"),
    [
        ([], {}, ValueError, "`windows` is empty"),
        (_windows(1, 1), {}, ValueError, "no token of `windows` can be predicted"),
        (_windows(4), {"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
    ],
    ids=["empty", "single_tokens", "batch_size"],
)
def test_mistakes_are_explained(model, windows, kwargs, error, message):
    with pytest.raises(error, match=message):
        perplexity(model, windows, **kwargs)


def test_a_model_without_logits_is_explained(model):
    with pytest.raises(TypeError, match="LlamaModel gives no logits"):
        perplexity(model.model, _windows(4))
