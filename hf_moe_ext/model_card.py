"""The model card of an exported model. Says what is known and nothing else."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml
from transformers import PreTrainedModel

from .modeling.modeling_moe_ext import MoeExtMixin
from .modeling.moe_models import OWN_MODELS
from .modeling.moe_router import get_router
from .modeling.moe_structure import iter_routers
from .patching import ModelDescription, describe
from .quantization.config import quantization_of
from .reporting.reading import parse_domains, parse_routing, read_domains, read_losses, read_routing


# Keys of `report`, in the order the docs explain them.
REPORT_KEYS = ("upcycling", "training", "evaluation", "routing", "base_model", "license", "language", "datasets")

# Papers of the ways to make a Mixture-of-Experts of a dense model. Routers name theirs in their docstring.
METHOD_PAPERS = {
    "sparse": ("Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", "2212.05055"),
    "drop": ("Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization", "2502.19261"),
    "masked": ("EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate", "2112.14397"),
    "granular": ("Upcycling Large Language Models into Mixture of Experts", "2410.07524"),
    "btx": ("Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM", "2403.07816"),
    "bam": ("BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts", "2408.08274"),
    "jetmoe": ("JetMoE: Reaching Llama2 Performance with 0.1M Dollars", "2404.07413"),
    "split": ("LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual Pre-training", "2406.16554"),
    "union_of_experts": (
        "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
        "2503.02495",
    ),
    "moefication": ("MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", "2110.01786"),
    "read_me": (
        "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
        "2410.19123",
    ),
}

# What the experts are before they are trained, by method.
_PARTS = (
    "Parts of the blocks of one dense model have no more ability than these, and less where a token uses some of them "
    "only."
)
_MIXED = (
    "Its routers are new, and its norms and embeddings are means of those of its sources: before training it does "
    "what none of them does."
)
_UNTRAINED = {
    **dict.fromkeys(("split", "union_of_experts", "moefication", "read_me", "jetmoe"), _PARTS),
    **dict.fromkeys(("bam", "btx"), _MIXED),
}

_PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "LMHeadModel": "text-generation",
    "Model": "feature-extraction",
}
_PAPER = re.compile(r'"([^"]+)"\s+\((\d{4}\.\d{4,5})')
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_extended(model: Any) -> bool:
    """Whether a model is of one of our classes, so that it needs our code to load."""
    return isinstance(model, MoeExtMixin) or model.config.model_type in OWN_MODELS


def render_card(model: PreTrainedModel, *, report: Any = None, name: str = "model", verification: Any = None) -> str:
    """The model card of a model, as Markdown with front matter.

    Args:
        model (`PreTrainedModel`):
            A stock or an extended model. Its `upcycle_report`, if it has one, is told.
        report (*optional*):
            What else is known. A dict with any of the keys

            - `upcycling`: how the experts were made, a dict or an object with `to_dict()`;
            - `training`: a dict of names and values;
            - `evaluation`: `{"domains": [...]}` (see `docs/report.md`), or a dict of names and values;
            - `routing`: `{"step", "layers"}`, one entry of a routing history;
            - `base_model`, `license`, `language`, `datasets`: front matter of the Hub;

            or an object with `to_dict()` (the report of an upcycling), or the output folder of a training.
        name (`str`, *optional*, defaults to `"model"`):
            Heading of the card.
        verification (`Verification`, *optional*):
            What `verify_folder` found.

    Raises:
        ValueError: for an unknown key of `report`.
    """
    known = collect_report(model, report)
    description = _describe(model)
    papers = _papers(model, known)
    template = Template((files("hf_moe_ext") / "templates" / "model_card.md").read_text(encoding="utf-8"))
    text = template.substitute(
        front_matter=_front_matter(model, known, papers),
        name=name,
        summary=_summary(model, description),
        usage=_usage(model, name),
        making=_making(known, verification),
        layers=_layers(description),
        routing=_routing(known),
        evaluation=_evaluation(known),
        limits=_limits(model, known),
        citations=_citations(papers),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def collect_report(model: PreTrainedModel, report: Any) -> dict[str, Any]:
    """Everything known about a model, by the keys of `REPORT_KEYS`."""
    known: dict[str, Any] = {}
    made = getattr(model, "upcycle_report", None)
    if made is not None:
        known["upcycling"] = made
    if isinstance(report, (str, os.PathLike)):
        known.update(_from_folder(Path(report).expanduser()))
    elif hasattr(report, "to_dict"):
        known["upcycling"] = report
    elif isinstance(report, Mapping):
        unknown = sorted(set(report) - set(REPORT_KEYS))
        if unknown:
            raise ValueError(f"`report` has the unknown keys {unknown}; known: {', '.join(REPORT_KEYS)}.")
        known.update(report)
    elif report is not None:
        raise TypeError(f"`report` must be a dict, a folder or an object with `to_dict()`, got {report!r}.")
    if hasattr(known.get("upcycling"), "to_dict"):
        known["upcycling"] = known["upcycling"].to_dict()
    for source in (known.get("upcycling", {}).get("source"), model.config.name_or_path):
        if _is_hub_id(source):
            known.setdefault("base_model", source)
    return {key: value for key, value in known.items() if value not in (None, {}, [])}


def _is_hub_id(name: Any) -> bool:
    """Whether a name may be told: a local path concerns nobody else."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _from_folder(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"`report` names `{folder}`, which is not a folder.")
    losses = read_losses(folder)
    training: dict[str, Any] = {"steps": max(step for values in losses.values() for step, _ in values)}
    for key, values in losses.items():
        if key == "moe/lm_loss":
            continue
        name = "training loss" if key == "loss" else f"held-out {key[5:].replace('_', ' ')}"
        training[f"{name}, first and last logged"] = f"{min(values)[1]:.4g}, {max(values)[1]:.4g}"
    found: dict[str, Any] = {"training": training}
    if (folder / "routing_history.jsonl").exists():
        last = read_routing(folder)[-1]
        found["routing"] = {"step": last.step, "layers": {key: vars(layer) for key, layer in last.layers.items()}}
    domains = read_domains(folder)
    if domains:
        found["evaluation"] = {"domains": [vars(domain) for domain in domains]}
    return found


def _front_matter(model: PreTrainedModel, known: dict[str, Any], papers: list[tuple[str, str]]) -> str:
    tags = ["moe", "mixture-of-experts", "hf-moe-ext"]
    tags += [f"router-{kind.replace('_', '-')}" for kind in _router_types(model)]
    if "upcycling" in known:
        tags.append("upcycled")
    tags += [f"arxiv:{number}" for _, number in papers]
    if is_extended(model):
        tags.append("custom_code")
    data: dict[str, Any] = {"library_name": "transformers"}
    for key in ("license", "language", "base_model", "datasets"):
        if key in known:
            data[key] = known[key]
    class_name = type(model).__name__
    pipeline = next((task for ending, task in _PIPELINES.items() if class_name.endswith(ending)), None)
    if pipeline is not None:
        data["pipeline_tag"] = pipeline
    data["tags"] = tags
    if "evaluation" in known:
        evaluation = known["evaluation"]
        data["metrics"] = ["perplexity"] if "domains" in evaluation else [str(key) for key in evaluation]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()


def _router_types(model: PreTrainedModel) -> list[str]:
    return sorted({router.moe_config.type for router in iter_routers(model)})


def _describe(model: PreTrainedModel) -> ModelDescription | None:
    try:
        return describe(model)
    except ValueError:  # an architecture without a family record: exported as it is
        return None


def _summary(model: PreTrainedModel, description: ModelDescription | None) -> str:
    if description is None:
        return f"A `{type(model).__name__}`, exported with hf-moe-ext."
    moe = [layer for layer in description.layers if layer.kind == "moe"]
    size = f"{_count(description.parameters)} parameters"
    if not moe:
        return f"A dense `{description.model}` with {size}."
    counts = sorted({layer.num_experts for layer in moe})
    experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"A Mixture-of-Experts `{description.model}` with {size}, of which a token uses at most "
        f"{_count(description.active_parameters)}. {len(moe)} of {len(description.layers)} layers have {experts} "
        "experts."
    )


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _usage(model: PreTrainedModel, name: str) -> str:
    auto_class = _auto_class(model)
    load = f'{auto_class}.from_pretrained("{name}"'
    if quantization_of(model.config) is not None:
        return (
            "Its weights are quantized in formats of the package hf-moe-ext (`pip install hf-moe-ext`), which has to "
            f"be imported first:\n\n{_code(auto_class, f'{load})', extra='import hf_moe_ext')}"
        )
    if not is_extended(model):
        return f"It is a stock architecture; no code beside Transformers is needed.\n\n{_code(auto_class, f'{load})')}"
    return (
        "With the package (`pip install hf-moe-ext`):\n\n"
        f"{_code(auto_class, f'{load})', extra='import hf_moe_ext')}\n\n"
        "Without it, by the code in this repository (needs PyTorch and Transformers only):\n\n"
        f"{_code(auto_class, f'{load}, trust_remote_code=True)')}\n\n"
        f'Replace `"{name}"` by the folder or the repository id. Do not load it with a stock class: it has no notion '
        "of what differs."
    )


def _auto_class(model: PreTrainedModel) -> str:
    class_name = type(model).__name__
    for key, value in (getattr(model.config, "auto_map", None) or {}).items():
        if value.endswith(f".{class_name}"):
            return key
    for ending in _PIPELINES:
        if ending.startswith("For") and ending != "ForConditionalGeneration" and class_name.endswith(ending):
            return f"AutoModel{ending}"
    return class_name if not is_extended(model) else "AutoModel"


def _code(auto_class: str, load: str, extra: str = "") -> str:
    lines = [f"from transformers import {auto_class}"]
    if extra:
        lines.insert(0, extra)
    return "\n".join(["```python", *lines, "", f"model = {load}", "```"])


def _making(known: dict[str, Any], verification: Any) -> str:
    parts = []
    if "base_model" in known:
        bases = known["base_model"]
        parts.append("Made from " + ", ".join(f"`{base}`" for base in ([bases] if isinstance(bases, str) else bases)))
        parts[-1] += "."
    if "upcycling" in known:
        parts.append("Upcycling:\n\n" + _list(known["upcycling"]))
    if "training" in known:
        parts.append("Training:\n\n" + _list(known["training"]))
    if not parts:
        parts.append("Nothing was recorded about how these weights were made.")
    if verification is not None:
        place = "with the package" if verification.needs_package else "without the package"
        found = "are bit-equal to"
        if not verification.exact:
            largest = f"largest logit {verification.max_logit:.3g}"
            found = f"differ by at most {verification.max_difference:.3g} ({largest}) from"
        parts.append(
            f"Checked when it was written: loaded in a clean process {place}, its logits on a small fixed "
            f"batch {found} those of the model it was written from."
        )
    return "\n\n".join(parts)


def _list(values: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in values.items():
        label = str(key).replace("_", " ")
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}- {label}:", _list(value, indent + "  ")]
        elif value not in (None, {}, [], (), "") and not (isinstance(value, (list, tuple)) and len(value) > 12):
            lines.append(f"{indent}- {label}: {_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """A value in words. Of a local path only the last part."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    text = str(value)
    if isinstance(value, os.PathLike) or os.path.isabs(text):
        return os.path.basename(text.rstrip("/\\")) or text
    return " ".join(text.split())


def _layers(description: ModelDescription | None) -> str:
    if description is None:
        return "This architecture has no family record in hf-moe-ext, so its layers are not listed."
    rows: list[tuple[str, list[str]]] = []
    for layer in (*description.layers, *description.attention):
        counts = [str(layer.num_experts), str(layer.num_experts_per_tok)] if layer.num_experts else ["", ""]
        router = f"`{layer.router}`" if layer.router else ""
        rows.append(
            (layer.key, [layer.kind, router, *counts, f"{layer.parameters:,}", f"{layer.active_parameters:,}"])
        )
    # Runs of equal layers share a row.
    merged: list[list[Any]] = []
    for key, cells in rows:
        if merged and merged[-1][2] == cells:
            merged[-1][1] = key
        else:
            merged.append([key, key, cells])
    heads = ("layer", "kind", "router", "experts", "at most per token", "parameters", "at most active")
    return _table(heads, [[first if first == last else f"{first} to {last}", *cells] for first, last, cells in merged])


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _routing(known: dict[str, Any]) -> str:
    if "routing" not in known:
        return ""
    found = parse_routing(known["routing"])
    rows = [
        [key, f"{layer.mean_k:.2f}", f"{layer.entropy:.3f}", f"{max(layer.relative_load):.2f}", str(layer.dead)]
        for key, layer in found.layers.items()
    ]
    heads = ("layer", "experts per token", "entropy (nats)", "fullest expert (1 = even share)", "without tokens")
    return f"## Routing\n\nMeasured at training step {found.step}.\n\n{_table(heads, rows)}"


def _evaluation(known: dict[str, Any]) -> str:
    if "evaluation" not in known:
        return ""
    data = known["evaluation"]
    if "domains" not in data:
        return f"## Evaluation\n\n{_list(data)}"
    names = ("dense", "upcycled", "trained", "mean_k")
    domains = parse_domains(data)
    used = [name for name in names if any(getattr(domain, name) is not None for domain in domains)]
    rows = [
        [domain.name, *("" if (v := getattr(domain, name)) is None else f"{v:.4g}" for name in used)]
        for domain in domains
    ]
    heads = ("domain", *("experts per token" if name == "mean_k" else name for name in used))
    return f"## Evaluation\n\nHeld-out perplexity (lower is better).\n\n{_table(heads, rows)}"


def _limits(model: PreTrainedModel, known: dict[str, Any]) -> str:
    points = []
    quantized = quantization_of(model.config)
    if quantized is not None:
        points.append(
            f"It is quantized ({quantized}): it computes something else than with its full weights, and runs with the "
            "package hf-moe-ext only."
        )
    elif is_extended(model):
        points.append(
            "It needs the code in this repository or the package hf-moe-ext. Engines that know stock architectures "
            "only (llama.cpp, most serving engines) cannot run it."
        )
    if "evaluation" not in known:
        points.append("No evaluation was recorded. Measure it on your task before you rely on it.")
    elif "domains" in known["evaluation"]:
        points.append("The perplexities above are of the named domains only; nothing else was measured.")
    if "base_model" in known or "upcycling" in known:
        points.append("It inherits the abilities, biases and licence terms of the model it was made from.")
    if "upcycling" in known and "training" not in known:
        points.append(
            "No training after the upcycling was recorded. "
            + _UNTRAINED.get(
                known["upcycling"].get("method"), "Untrained copies of one dense block add parameters, not ability."
            )
        )
    points.append("Active parameters are an upper bound where the router chooses how many experts a token uses.")
    return "\n".join(f"- {point}" for point in points)


def _papers(model: PreTrainedModel, known: dict[str, Any]) -> list[tuple[str, str]]:
    papers = []
    for kind in _router_types(model):
        papers += [(" ".join(t.split()), number) for t, number in _PAPER.findall(get_router(kind).__doc__ or "")]
    if model.config.model_type in OWN_MODELS:
        papers += _PAPER.findall(sys.modules[type(model).__module__].__doc__ or "")
    method = known.get("upcycling", {}).get("method")
    if method in METHOD_PAPERS:
        papers.append(METHOD_PAPERS[method])
    return list(dict.fromkeys(papers))


def _citations(papers: list[tuple[str, str]]) -> str:
    if not papers:
        return ""
    lines = [f"- [{title}](https://huggingface.co/papers/{number}), arXiv {number}" for title, number in papers]
    return "\n".join(["## Papers", "", *lines])
