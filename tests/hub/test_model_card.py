"""The model card tells what is known, all of it, and nothing else."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

from hf_moe_ext.hub import Verification
from hf_moe_ext.model_card import METHOD_PAPERS, render_card
from hf_moe_ext.modeling.modeling_moe_ext import extended_class
from tests.hub.models import llama, mixtral, stock_llama, stock_mixtral


EXAMPLE = Path(__file__).resolve().parents[2] / "model_cards" / "example.md"

LAYER = {"load": [0.5, 0.25, 0.25, 0.0], "entropy": 1.1, "mean_k": 1.6, "dead": 1}
REPORT = {
    "base_model": "someone/a-dense-model",
    "license": "apache-2.0",
    "language": ["en"],
    "upcycling": {
        "method": "sparse",
        "method_options": {},
        "source": "someone/a-dense-model",
        "num_experts": 4,
        "router": {"type": "top_p", "renormalize": True},
        "preserves_function": True,
        "max_abs_difference": 1.2e-6,
    },
    "training": {"steps": 300, "tokens": 614400, "training loss, first and last logged": "2.914, 2.203"},
    "evaluation": {
        "domains": [
            {"name": "Python source", "dense": 11.213, "upcycled": 11.213, "trained": 8.418, "mean_k": 1.72},
            {"name": "prose", "dense": 33.15, "upcycled": 33.15, "trained": 29.7, "mean_k": 1.93},
        ]
    },
    "routing": {"step": 300, "layers": {"0": LAYER, "1": {**LAYER, "mean_k": 1.9}}},
}
VERIFIED = Verification(0.0, 12.5, True, "cpu", True, 4.0)


def example():
    return render_card(llama(), report=REPORT, name="tiny-moe", verification=VERIFIED)


def data_of(text):
    return ModelCard(text).data.to_dict()


def test_the_example_is_in_step():
    # To renew it: python -m tests.hub.test_model_card
    assert EXAMPLE.read_text() == example()


def test_the_front_matter_is_that_of_the_hub():
    data = data_of(example())

    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "someone/a-dense-model" and data["license"] == "apache-2.0"
    assert data["language"] == ["en"] and data["metrics"] == ["perplexity"]
    assert {"moe", "hf-moe-ext", "router-top-p", "upcycled", "arxiv:2403.07652", "custom_code"} <= set(data["tags"])


def test_numbers_are_those_that_were_passed():
    text = example()

    assert "| Python source | 11.21 | 11.21 | 8.418 | 1.72 |" in text
    assert "| 0 | 1.60 | 1.100 | 2.00 | 1 |" in text
    assert "- max abs difference: 1.2e-06" in text and "- steps: 300" in text
    assert "bit-equal" in text
    assert f"papers/{METHOD_PAPERS['sparse'][1]}" in text and "papers/2403.07652" in text
    assert "| 0 to 1 | moe | `top_p` | 4 | 4 | 21,696 | 21,696 |" in text


@pytest.mark.parametrize("make", [llama, mixtral, stock_mixtral, stock_llama], ids=lambda make: make.__name__)
def test_nothing_is_invented(make):
    text = render_card(make(), name="tiny")

    assert "license" not in data_of(text) and "base_model" not in data_of(text) and "metrics" not in data_of(text)
    assert "Nothing was recorded about how these weights were made." in text
    assert "No evaluation was recorded." in text
    assert "## Evaluation" not in text and "## Routing" not in text and "bit-equal" not in text
    assert not re.search(r"\$\w|None|\n{3}", text)


def test_an_extended_model_tells_both_ways_to_load():
    text = render_card(mixtral(), name="tiny")
    assert "import hf_moe_ext\nfrom transformers import AutoModelForCausalLM" in text
    assert 'AutoModelForCausalLM.from_pretrained("tiny", trust_remote_code=True)' in text
    assert "Do not load it with a stock class" in text


def test_a_stock_model_needs_no_code():
    text = render_card(stock_mixtral(), name="tiny")
    assert 'AutoModelForCausalLM.from_pretrained("tiny")' in text
    assert "trust_remote_code" not in text and "custom_code" not in data_of(text)["tags"]


@dataclass
class Report:
    method: str = "drop"
    source: str = ""

    def to_dict(self):
        return vars(self)


def test_the_record_of_an_upcycling_is_told(tmp_path):
    model = stock_mixtral()
    model.upcycle_report = Report(source=str(tmp_path / "secret" / "dense-model"))

    text = render_card(model)
    assert "- method: drop" in text and "- source: dense-model" in text and str(tmp_path) not in text
    assert "2502.19261" in text and "No training after the upcycling was recorded." in text
    assert render_card(model, report=Report("sparse")) != text


def test_the_source_of_an_upcycling_is_the_base_model():
    assert data_of(render_card(stock_mixtral(), report=Report("sparse", "owner/dense")))["base_model"] == "owner/dense"


def test_a_local_base_model_is_not_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/model").mkdir(parents=True)
    for path in (str(tmp_path / "owner"), "owner/model"):
        model = stock_mixtral()
        model.config.name_or_path = path
        assert "base_model" not in data_of(render_card(model))
    model.config.name_or_path = "owner/other"
    assert data_of(render_card(model))["base_model"] == "owner/other"


def test_a_training_folder_is_read(tmp_path):
    history = [{"loss": 3.0, "step": 10}, {"loss": 2.5, "step": 20}, {"eval_loss": 2.75, "step": 20}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "routing_history.jsonl").write_text(json.dumps({"step": 20, "layers": {"0": LAYER}}) + "\n")
    (tmp_path / "evaluation.json").write_text(json.dumps(REPORT["evaluation"]))

    text = render_card(llama(), report=tmp_path)
    assert "- steps: 20" in text and "- training loss, first and last logged: 3, 2.5" in text
    assert "- held-out loss, first and last logged: 2.75, 2.75" in text
    assert "Measured at training step 20." in text and "| prose | 33.15" in text


def test_metrics_by_name():
    text = render_card(llama(), report={"evaluation": {"accuracy": 0.5}})
    assert "- accuracy: 0.5" in text and data_of(text)["metrics"] == ["accuracy"]


@pytest.mark.parametrize(
    ("report", "error", "message"),
    [
        ({"evalution": {}}, ValueError, r"unknown keys \['evalution'\]; known: upcycling, training, evaluation"),
        (7, TypeError, "must be a dict, a folder or an object"),
        ("no/such/folder", FileNotFoundError, "`no/such/folder`, which is not a folder"),
        ({"routing": {"step": 1}}, ValueError, "`routing` has no 'layers'"),
    ],
    ids=["key", "type", "folder", "routing"],
)
def test_bad_reports(report, error, message):
    with pytest.raises(error, match=message):
        render_card(llama(), report=report)


def test_layers_that_differ_have_rows_of_their_own():
    model_class = extended_class(LlamaForCausalLM)
    config = llama().config.to_dict()
    config["moe_ext"]["layers"] = {"1": {"experts": {"num_experts": 2}}}
    text = render_card(model_class(model_class.config_class(**config)))

    assert "| 0 | moe | `top_p` | 4 |" in text and "| 1 | moe | `top_p` | 2 |" in text
    assert "have 2 to 4 experts" in text


if __name__ == "__main__":
    EXAMPLE.write_text(example())
