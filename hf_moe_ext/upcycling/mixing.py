"""Several dense models of one architecture to one Mixture-of-Experts: Branch-Train-MiX and BAM.

"Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM" (2403.07816); "BAM! Just Like That: Simple and
Efficient Parameter Upcycling for Mixture of Experts" (2408.08274). The feed-forward blocks of the sources become the
experts of each layer, and with BAM their attention blocks become attention experts; everything else is their mean.

A mixture is made group by group of tensors that belong together, so that models in memory and checkpoints on disk go
through the same functions, and give the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..modeling.attention_bam import BamAttentionConfig, head_layout, projections
from ..modeling.attention_heads import HeadLayout
from ..modeling.moe_families import AttentionSpec, get_by_path, has_path, iter_layers
from .layer_jobs import LayerJob
from .live import (
    dense_class,
    fill_created,
    fill_parts,
    finish_report,
    load_dense,
    make_report,
)
from .methods import ExpertStack
from .plan import UpcyclePlan
from .report import UpcycleReport
from .safetensors_io import SafetensorsFolder
from .stored_names import missing_names, stored_names


logger = logging.get_logger(__name__)

Tensors = dict[str, torch.Tensor]

# What a config may say differently without changing what the weights mean.
_FREE_KEYS = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "initializer_range",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "_attn_implementation_autoset",
}

PARALLEL_NOTE = (
    "The blocks of this architecture compute attention and experts one after the other. BAM was published for blocks "
    "that compute both from one normed input, side by side."
)


@dataclass(frozen=True)
class Source:
    """One of the models that are mixed.

    Attributes:
        name: for messages and the report.
        config: its config.
        model: the model, or `None` for a checkpoint on disk.
        folder: the checkpoint's tensors, or `None`.
        keys: the checkpoint's key of each parameter.
    """

    name: str
    config: PreTrainedConfig
    model: PreTrainedModel | None = None
    folder: SafetensorsFolder | None = None
    keys: dict[str, str] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by their names in the model."""
        if self.model is not None:
            return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        assert self.folder is not None and self.keys is not None
        return {name: self.folder.infos[key].shape for name, key in self.keys.items()}

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in the model."""
        if self.model is not None:
            owner, _, attribute = name.rpartition(".")
            found: torch.Tensor = getattr(self.model.get_submodule(owner), attribute)
            return found.detach()
        assert self.folder is not None and self.keys is not None
        return self.folder.read(self.keys[name])


@dataclass(frozen=True)
class Group:
    """Tensors of all sources that become tensors of the mixture together.

    Attributes:
        names: of the sources' tensors, by role.
        make: from the tensors of each source by role to those of the mixture by name.
        layer: whether this is what a progress bar counts.
    """

    names: dict[str, str]
    make: Callable[[list[Tensors]], Tensors]
    layer: bool = False


class Mixture:
    """What a mixture consists of. Nothing is read before `groups` are.

    Args:
        plan: of the first source; its jobs are those of all.
        dense: the first source, live or on meta, for names and shapes.
        model: the mixture on meta.
        weights: of the sources in means; they sum to 1.
    """

    def __init__(
        self, plan: UpcyclePlan, dense: PreTrainedModel, model: PreTrainedModel, weights: Sequence[float]
    ) -> None:
        self.plan, self.dense, self.model, self.weights = plan, dense, model, list(weights)
        self.expected = model.state_dict()

    def groups(self, names: Sequence[str]) -> Iterator[Group]:
        """All groups, in the order of the layers. `names` are those of the sources' tensors that are to be mixed."""
        starts: dict[str, Group] = {}
        taken: set[str] = set()
        attentions = self._attentions()
        for job in self.plan.jobs:
            starts[next(iter(job.sources.values()))] = Group(job.sources, self._experts(job), layer=True)
            taken |= set(job.sources.values())
        for group in attentions:
            starts[next(iter(group.names.values()))] = group
            taken |= set(group.names.values())
        for name in names:
            if name in starts:
                yield starts[name]
            elif name not in taken:
                yield Group({name: name}, self._mean_of)

    def _mean_of(self, tensors: list[Tensors]) -> Tensors:
        return {name: self.mean([each[name] for each in tensors]) for name in tensors[0]}

    def mean(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The weighted mean, computed in float64; of integers, which have none, the first."""
        first = tensors[0]
        if not first.is_floating_point():
            return first.clone()
        if all(torch.equal(first, other) for other in tensors[1:]):
            return first.clone()
        total = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
        for tensor, weight in zip(tensors, self.weights, strict=True):
            total.add_(tensor.to(total), alpha=weight)
        return total.to(first.dtype)

    def _experts(self, job: LayerJob) -> Callable[[list[Tensors]], Tensors]:
        def make(tensors: list[Tensors]) -> Tensors:
            blocks = [job.read(each) for each in tensors]
            has_bias = blocks[0].up_bias is not None
            stack = ExpertStack(
                torch.stack([block.up for block in blocks]),
                torch.stack([block.down for block in blocks]),
                torch.stack([block.up_bias for block in blocks]) if has_bias else None,
                torch.stack([block.down_bias for block in blocks]) if has_bias else None,
            )
            made = self.plan.place(job, blocks[0], stack)
            if self.plan.target == "stock":
                return made
            return fill_created(self.model, job, self.plan.options.seed, made[job.gate]) | made

        return make

    def _attentions(self) -> list[Group]:
        """The attention blocks of layers that get attention experts."""
        extension, family = self.plan.extension, self.plan.family
        found: list[Group] = []
        if extension is None or family.attention is None:
            return found
        names = {id(module): name for name, module in self.dense.named_modules()}
        for key, layer, base in iter_layers(self.dense, family):
            parts = extension.for_layer(key)
            if parts is None or not isinstance(parts.attention, BamAttentionConfig):
                continue
            attention = get_by_path(layer, family.attention.site)
            layout = head_layout(parts.attention, base.config)
            roles = attention_tensors(family.attention, attention)
            prefix = names[id(attention)]
            sources = {role: f"{prefix}.{role}" for role in roles}
            found.append(Group(sources, self._attention(family.attention, layout, prefix)))
        return found

    def _attention(self, spec: AttentionSpec, layout: HeadLayout, prefix: str) -> Callable[[list[Tensors]], Tensors]:
        def make(tensors: list[Tensors]) -> Tensors:
            made = merge_attention(spec, layout, tensors, self.mean)
            return {f"{prefix}.{role}": tensor.contiguous() for role, tensor in made.items()}

        return make


def attention_tensors(spec: AttentionSpec, attention: torch.nn.Module) -> list[str]:
    """The tensors of an attention that become those of several: projections and norms of single heads."""
    paths = [*projections(spec), *(path for path in (spec.query_norm, spec.key_norm) if path)]
    return [
        f"{path}.{name}"
        for path in paths
        if has_path(attention, path)
        for name, _ in get_by_path(attention, path).named_parameters(recurse=False)
    ]


def merge_attention(
    spec: AttentionSpec, layout: HeadLayout, sources: list[Tensors], mean: Callable[[list[torch.Tensor]], torch.Tensor]
) -> Tensors:
    """The tensors of one wide attention from those of N, by their names in the attention module.

    Shared keys and values, and their norms, are means.
    """
    made: Tensors = {}
    for role in sources[0]:
        path, _, name = role.rpartition(".")
        tensors = [source[role] for source in sources]
        if path == spec.output:
            if name == "bias":
                made[f"{path}.moe_bias"] = torch.stack(tensors)
            else:
                made[role] = layout.merge_queries([tensor.t() for tensor in tensors]).t()
        elif path in (spec.query_norm, spec.key_norm):
            heads = layout.heads if path == spec.query_norm else layout.key_heads
            if layout.shared and path == spec.key_norm:
                made[role] = mean(tensors)
                continue
            rows = [tensor.expand(heads, -1) for tensor in tensors]
            merged = layout.merge_queries(rows) if path == spec.query_norm else torch.cat(rows)
            made[role] = merged[:, None] if spec.norm_heads_first else merged
        elif layout.shared and path in (spec.key, spec.value):
            made[role] = mean(tensors)
        elif path == spec.query:
            made[role] = layout.merge_queries(tensors)
        else:
            made[role] = torch.cat(tensors)
    return made


def check_sources(sources: Sequence[Source]) -> None:
    """Raise `ValueError` where the sources cannot be mixed, naming the source and what differs."""
    if len(sources) < 2:
        raise ValueError(f"a mixture needs at least two models, got {len(sources)}.")
    first = sources[0]
    known = {key: value for key, value in first.config.to_dict().items() if key not in _FREE_KEYS}
    for other in sources[1:]:
        values = {key: value for key, value in other.config.to_dict().items() if key not in _FREE_KEYS}
        if type(first.config) is not type(other.config):
            raise ValueError(
                f"{other.name} is a {other.config.model_type} model, {first.name} a {first.config.model_type} one; "
                "all sources must be of one architecture."
            )
        for key in sorted(known.keys() | values.keys()):
            if known.get(key) != values.get(key):
                hint = ""
                if key == "vocab_size":
                    hint = " Resize the embeddings of all to one tokenizer first."
                raise ValueError(
                    f"`{key}` is {values.get(key)!r} in {other.name} and {known.get(key)!r} in {first.name}; models "
                    f"that are mixed must agree on it.{hint}"
                )
        if first.model is not None and other.model is not None and type(first.model) is not type(other.model):
            raise ValueError(
                f"{other.name} is a {type(other.model).__name__}, {first.name} a {type(first.model).__name__}."
            )
        ours, theirs = first.shapes(), other.shapes()
        for name in ours:
            if name not in theirs:
                raise ValueError(f"{other.name} has no tensor `{name}`, which {first.name} has.")
            if ours[name] != theirs[name]:
                raise ValueError(
                    f"`{name}` has the shape {theirs[name]} in {other.name} and {ours[name]} in {first.name}; models "
                    "that are mixed must agree on it."
                )


def mean_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights of the sources in means, made to sum to 1.

    Raises:
        ValueError: for another number of weights than sources, a negative one, or a sum of 0.
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"`weights` has {len(weights)} entries for {count} models.")
    if any(weight < 0 for weight in weights) or sum(weights) <= 0:
        raise ValueError(f"`weights` must be non-negative with a positive sum, got {list(weights)}.")
    return [weight / sum(weights) for weight in weights]


def open_sources(sources: Any, domains: Sequence[str] | None, *, live: bool) -> list[Source]:
    """The models to mix: objects as they are, names as models (`live`) or as checkpoints.

    Raises:
        TypeError, ValueError, FileNotFoundError: where they are not what can be mixed.
    """
    if isinstance(sources, (str, Path, PreTrainedModel)) or not isinstance(sources, Sequence):
        raise TypeError(f"expected a list of models, the seed first, got {type(sources).__name__}.")
    if domains is not None and len(domains) != len(sources):
        raise ValueError(f"`domains` has {len(domains)} names for {len(sources)} models.")
    found = []
    for number, source in enumerate(sources):
        name = f"source {number}" if domains is None else domains[number]
        if isinstance(source, PreTrainedModel):
            found.append(Source(name, source.config, model=source))
        elif isinstance(source, (str, Path)):
            found.append(_open(source, str(source) if domains is None else name, live=live))
        else:
            raise TypeError(f"source {number} is a {type(source).__name__}; expected a model, a folder or a name.")
    check_sources(found)
    return found


def _open(source: str | Path, name: str, *, live: bool) -> Source:
    if live:
        model = load_dense(source)
        return Source(name, model.config, model=model)
    folder = SafetensorsFolder(Path(source))
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = dense_class(config, source)._from_config(config, dtype=folder.main_dtype)
    keys = stored_names(model, folder)
    missing = missing_names(model, keys)
    if missing:
        raise ValueError(f"the checkpoint {source} lacks {len(missing)} tensors, the first is `{missing[0]}`.")
    return Source(name, config, folder=folder, keys=keys)


def mixture_report(
    plan: UpcyclePlan,
    dense: PreTrainedModel,
    model: PreTrainedModel,
    method: str,
    sources: Sequence[Source],
    told: dict[str, Any],
) -> UpcycleReport:
    """What is known of a mixture before it is made."""
    report = make_report(plan, dense)
    report.method, report.sources = method, [source.name for source in sources]
    report.method_options = {name: value for name, value in told.items() if value is not None}
    if method == "bam" and not plan.family.parallel:
        report.note = PARALLEL_NOTE
    finish_report(report, model)
    return report


def mix_live(
    sources: Sequence[Source], plan: UpcyclePlan, weights: Sequence[float], method: str, told: dict[str, Any]
) -> Any:
    """The mixture of models in memory."""
    dense = sources[0].model
    assert dense is not None
    config = plan.result_config(dense)
    with torch.device("meta"):
        empty = plan.result_class(dense)._from_config(copy.deepcopy(config), dtype=dense.dtype)
    plan.make_gates(dense)
    mixture = Mixture(plan, dense, empty, weights)
    tied = set(empty.all_tied_weights_keys) if hasattr(empty, "all_tied_weights_keys") else set()
    names = [name for name in dense.state_dict() if name not in tied]
    state: Tensors = {}
    with tqdm(total=len(plan.jobs), desc="Upcycling", unit="layer") as progress:
        for group in mixture.groups(names):
            tensors = [{role: source.read(name) for role, name in group.names.items()} for source in sources]
            state |= group.make(tensors)
            progress.update(group.layer)
    state |= fill_parts(empty, plan.options.seed, dense.device, skip=blocks_of(plan.jobs))
    left = sorted(mixture.expected.keys() - state.keys() - tied)
    assert not left, left
    device = {} if dense.device.type == "cpu" else {"device_map": {"": dense.device}}
    model = plan.result_class(dense).from_pretrained(
        None, config=config, state_dict=state, dtype=dense.dtype, **device
    )
    vars(model).pop("_weight_conversions", None)
    if dense.can_generate():
        model.generation_config = copy.deepcopy(dense.generation_config)
    model.config._name_or_path = dense.config._name_or_path
    model.train(dense.training)
    report = mixture_report(plan, dense, model, method, sources, told)
    model.upcycle_report = report
    logger.info(str(report))
    return model


def blocks_of(jobs: Sequence[LayerJob]) -> tuple[str, ...]:
    """How the names of the tensors of the blocks begin that jobs make."""
    return tuple(f"{job.gate.rpartition('.')[0].rpartition('.')[0]}." for job in jobs)
