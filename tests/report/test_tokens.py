"""Which experts the tokens of a text went to, against the gates' own answers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

import hf_moe_ext as moe
from hf_moe_ext.reporting.tokens import trace_tokens


class Words:
    """A tokenizer as far as it is needed."""

    def decode(self, tokens):
        return f" <w{tokens[0]}>"


def test_experts_are_those_of_the_gates():
    model, ids = tiny_model("mixtral"), torch.randint(4, 80, (1, 6), generator=torch.Generator().manual_seed(0))
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    kind = type(model)
    found = trace_tokens(model, Words(), ids)
    assert type(model) is kind and found.model == "MixtralForCausalLM"
    assert found.keys == ["0", "1", "2"] and found.num_experts == [8, 8, 8]
    for layer, (_, weights, index) in enumerate(seen):
        order = weights.argsort(dim=-1, descending=True)
        assert found.experts[layer] == index.gather(-1, order).tolist()
        torch.testing.assert_close(torch.tensor(found.weights[layer]), weights.gather(-1, order), rtol=1e-4, atol=1e-5)
        assert found.main_expert(layer) == index.gather(-1, order)[:, 0].tolist()


def test_text_page_and_null_experts(tmp_path):
    model = moe.extend(tiny_model("mixtral"), {"router": {"type": "adamoe"}})
    found = trace_tokens(model, Words(), torch.tensor([[5, 6, 7]]))
    page = found.write(tmp_path / "page.html").read_text()
    assert page.count("<h2>") == 3 and page.count("&lt;w5&gt;") == 3 and "<w5>" not in page
    text = found.coloured()
    assert text.index("w5") < text.index("w6") < text.index("w7") and "layer 2" in found.legend()


def test_what_is_refused():
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match=r"one text, \(1, S\), got \(2, 3\)"):
        trace_tokens(model, Words(), torch.zeros(2, 3, dtype=torch.long))
