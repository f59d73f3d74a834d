"""The real SmolLM2-135M-Instruct, out of its Python package."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_moe_ext.data import load_domain, pack, package_file
from hf_moe_ext.data.packages import SMOLLM2
from hf_moe_ext.evaluation import perplexity
from hf_moe_ext.gguf import from_gguf


pytestmark = [pytest.mark.real_data, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = package_file(SMOLLM2)
    except OSError as error:
        pytest.skip(str(error))
    return from_gguf(path)


@pytest.fixture(scope="module")
def model(smollm2):
    return smollm2[0]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2[1]


def _continuation(model, tokenizer, inputs, tokens: int) -> str:
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_is_a_plain_dense_model(model):
    assert type(model) is LlamaForCausalLM
    assert model.num_parameters() == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_knows_the_capital_of_france(model, tokenizer):
    inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False)
    assert _continuation(model, tokenizer, inputs, 3).startswith(" Paris")


def test_chats_and_stops(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "Paris" in _continuation(model, tokenizer, inputs, 24)


# Nats per token in the first windows of 512. The text of `prose` is part of this project and that of `maths` is
# pinned, so only rounding may change their values: this catches wrong weights, rotations or tokens. The text of
# `python` depends on the version of Python (the value is that of 3.11), hence the wide tolerance.
@pytest.mark.parametrize(
    ("domain", "windows", "nats", "tolerance"),
    [("prose", 3, 4.175, 0.003), ("python", 6, 2.130, 0.2), ("maths", 5, 1.995, 0.003)],
    ids=["prose", "python", "maths"],
)
def test_predicts_held_out_text_as_it_should(model, tokenizer, domain, windows, nats, tolerance):
    try:
        documents = load_domain(domain, "test")
    except OSError as error:
        pytest.skip(str(error))
    result = perplexity(model, pack(documents, tokenizer, 512, limit=windows))
    assert result.nats == pytest.approx(nats, abs=tolerance)


def test_saves_and_reloads_equal(model, tokenizer, tmp_path):
    inputs = tokenizer("Two plus two is", return_tensors="pt", return_token_type_ids=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
