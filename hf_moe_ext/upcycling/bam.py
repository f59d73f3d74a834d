"""`upcycle([seed, a, b], method="bam" | "btx")`: several models of one seed become one Mixture-of-Experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from ..files import check_target, staged_folder
from ..modeling.attention_bam import BamAttentionConfig
from ..modeling.configuration_moe_ext import LayerExtension, RouterConfig
from ..modeling.router_top_k import TopKRouterConfig
from .checkpoint import check_space, write_companions
from .live import dense_class, fill_parts
from .methods import register_model_method
from .mixing import Mixture, Source, blocks_of, mean_weights, mix_live, mixture_report, open_sources
from .plan import UpcycleOptions, UpcyclePlan, make_plan
from .report import UpcycleReport
from .safetensors_io import SafetensorsWriter, TensorInfo, parse_size


logger = logging.get_logger(__name__)

# Weights of the auxiliary losses of the feed-forward router. The paper of BAM names the losses, as sums over layers,
# and not their weights; here losses are means over layers.
_BALANCE, _Z = 1e-2, 1e-3


@register_model_method("btx")
def upcycle_btx(
    sources: Sequence[PreTrainedModel | str | Path],
    *,
    num_experts_per_tok: int | None = None,
    router: RouterConfig | dict[str, Any] | str | None = None,
    parts: LayerExtension | dict[str, Any] | None = None,
    layers: str | Sequence[int | str] = "all",
    target: Literal["auto", "stock", "ext"] = "auto",
    gate_init: str | dict[str, torch.Tensor] = "normal",
    gate_prompts: Sequence[Sequence[str]] | None = None,
    negative_prompts: Sequence[Sequence[str]] | None = None,
    tokenizer: Any = None,
    gate_noise: float = 0.0,
    weights: Sequence[float] | None = None,
    domains: Sequence[str] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Branch-Train-MiX: the feed-forward blocks of the sources become experts, everything else is their mean.

    Args:
        sources (`list`):
            Dense models of one architecture and one seed model, the seed first: objects, folders, or names on the Hub.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Experts of a token.
        router, parts, layers, target, gate_init, gate_prompts, negative_prompts, tokenizer, gate_noise, seed:
            As in `upcycle`; gates and prompts have a row and a list for each source.
        weights (`list[float]`, *optional*):
            Of the sources in the means; equal ones where it is not given.
        domains (`list[str]`, *optional*):
            Names of the sources, for the report and the model card.

    Returns:
        The mixture, with an `UpcycleReport` as its attribute `upcycle_report`. It does not compute what any source
        does; it has to be trained.

    Raises:
        TypeError, ValueError: where the sources differ in more than their weights, or arguments do not fit.
    """
    opened = open_sources(sources, domains, live=True)
    options = UpcycleOptions(
        "sparse",
        len(opened),
        2 if num_experts_per_tok is None else num_experts_per_tok,
        router,
        layers,
        target,
        gate_init,
        gate_prompts,
        negative_prompts,
        tokenizer,
        gate_noise,
        seed,
        parts=parts,
    )
    return _mix(opened, options, "btx", weights)


@register_model_method("bam")
def upcycle_bam(
    sources: Sequence[PreTrainedModel | str | Path],
    *,
    attention_kv: Literal["expert", "shared"] = "expert",
    attention_router: RouterConfig | dict[str, Any] | str | None = None,
    num_experts_per_tok: int | None = None,
    router: RouterConfig | dict[str, Any] | str | None = None,
    parts: LayerExtension | dict[str, Any] | None = None,
    layers: str | Sequence[int | str] = "all",
    gate_init: str | dict[str, torch.Tensor] = "normal",
    gate_prompts: Sequence[Sequence[str]] | None = None,
    negative_prompts: Sequence[Sequence[str]] | None = None,
    tokenizer: Any = None,
    gate_noise: float = 0.0,
    weights: Sequence[float] | None = None,
    domains: Sequence[str] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Branch-Attend-Mix: feed-forward blocks become experts, attention blocks attention experts that every token uses.

    Args:
        sources (`list`):
            Dense models of one architecture and one seed model, the seed first: objects, folders, or names on the Hub.
        attention_kv (`"expert"` or `"shared"`, *optional*, defaults to `"expert"`):
            Whether attention experts have keys and values of their own, and the cache is as many times as large, or
            share the mean of the sources'.
        attention_router (`RouterConfig`, `dict` or `str`, *optional*):
            Router of the attention experts; soft where it is not given.
        num_experts_per_tok (`int`, *optional*, defaults to 1):
            Feed-forward experts of a token.
        router (`RouterConfig`, `dict` or `str`, *optional*):
            Of the feed-forward experts. `None` is that of the paper: top-k of a softmax over all experts, whose
            weights are not renormalised, with load-balancing and z-loss.
        parts, layers, gate_init, gate_prompts, negative_prompts, tokenizer, gate_noise, weights, domains, seed:
            As for `method="btx"`.

    Returns:
        The mixture, with an `UpcycleReport` as its attribute `upcycle_report`. It has to be trained.

    Raises:
        TypeError, ValueError: where the sources differ in more than their weights, or the architecture's attention
            cannot hold experts.
    """
    opened = open_sources(sources, domains, live=True)
    options = _bam_options(
        len(opened),
        BamAttentionConfig(num_experts=len(opened), key_values=attention_kv, router=attention_router),
        num_experts_per_tok=num_experts_per_tok,
        router=router,
        layers=layers,
        gate_init=gate_init,
        gate_prompts=gate_prompts,
        negative_prompts=negative_prompts,
        tokenizer=tokenizer,
        gate_noise=gate_noise,
        seed=seed,
        parts=parts,
    )
    return _mix(opened, options, "bam", weights, attention_kv=attention_kv)


def _bam_options(
    count: int, attention: BamAttentionConfig, *, num_experts_per_tok: int | None, router: Any, **given: Any
) -> UpcycleOptions:
    if router is None:
        router = TopKRouterConfig(renormalize=False, balance_coef=_BALANCE, z_coef=_Z)
    used = 1 if num_experts_per_tok is None else num_experts_per_tok
    options = UpcycleOptions("sparse", count, used, router, target="ext", **given)
    extra = options.extra_parts()
    if extra.attention is not None:
        raise ValueError('`parts` declares attention, which `method="bam"` does itself; drop it.')
    extra.attention = attention
    options.parts = extra
    return options


def _mix(
    sources: list[Source], options: UpcycleOptions, method: str, weights: Sequence[float] | None, **told: Any
) -> PreTrainedModel:
    shares = mean_weights(weights, len(sources))
    dense = sources[0].model
    assert dense is not None
    plan = make_plan(dense, options)
    told["weights"] = weights and list(weights)
    model: PreTrainedModel = mix_live(sources, plan, shares, method, told)
    return model


def mix_checkpoints(
    sources: Sequence[str | Path],
    destination: str | Path,
    method: str,
    *,
    num_experts_per_tok: int | None = None,
    router: Any = None,
    parts: Any = None,
    layers: str | Sequence[int | str] = "all",
    target: Literal["auto", "stock", "ext"] = "auto",
    gate_init: str | dict[str, torch.Tensor] = "normal",
    gate_noise: float = 0.0,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    attention_kv: Literal["expert", "shared"] = "expert",
    attention_router: Any = None,
    weights: Sequence[float] | None = None,
    domains: Sequence[str] | None = None,
) -> UpcycleReport:
    """`upcycle_checkpoint` for several sources: folders in, a folder out, without loading a model.

    Peak memory is about one layer of all sources, and as much of the mixture. Arguments are those of `method`, and of
    `upcycle_checkpoint`.
    """
    count = len(sources)
    given: dict[str, Any] = {"layers": layers, "gate_init": gate_init, "gate_noise": gate_noise}
    given |= {"seed": seed, "parts": parts}
    if method == "bam":
        if target == "stock":
            raise ValueError('attention experts are nothing that a stock class has; drop `target="stock"`.')
        attention = BamAttentionConfig(num_experts=count, key_values=attention_kv, router=attention_router)
        options = _bam_options(count, attention, num_experts_per_tok=num_experts_per_tok, router=router, **given)
    elif method == "btx":
        if attention_kv != "expert" or attention_router is not None:
            raise TypeError('`attention_kv` and `attention_router` are for `method="bam"`; BTX averages attention.')
        used = 2 if num_experts_per_tok is None else num_experts_per_tok
        options = UpcycleOptions("sparse", count, used, router, target=target, **given)
    else:
        raise ValueError(f"several sources are mixed by the methods `bam` and `btx`, not by `{method}`.")
    options.check()
    shard_size = parse_size(max_shard_size)
    place = check_target(destination, overwrite=overwrite)
    opened = open_sources([Path(source) for source in sources], domains, live=False)
    shares = mean_weights(weights, len(opened))
    if place in [Path(source).resolve() for source in sources]:
        raise ValueError(f"`destination` is one of the sources, {place}; choose another one.")
    seed_folder, first = Path(sources[0]), opened[0]
    assert first.folder is not None and first.keys is not None
    main = dtype or first.folder.main_dtype
    with torch.device("meta"):
        dense = dense_class(first.config, sources[0])._from_config(first.config, dtype=main).eval()
        plan = make_plan(dense, options)
        model = plan.result_class(dense)._from_config(plan.result_config(dense), dtype=main).eval()
    plan.make_gates(None)
    told = {"attention_kv": attention_kv if method == "bam" else None, "weights": weights and list(weights)}
    report = mixture_report(plan, dense, model, method, opened, told)
    report.source = str(sources[0])
    mixture = Mixture(plan, dense, model, shares)
    shared = fill_parts(model, seed, "cpu", skip=blocks_of(plan.jobs))
    infos = _infos(mixture, plan, list(first.keys))
    check_space(place, sum(info.num_bytes for info in infos.values()))
    with staged_folder(place, overwrite=overwrite) as staging:
        write_companions(seed_folder, staging, model)
        writer = SafetensorsWriter(staging, infos, shard_size)
        with tqdm(total=len(plan.jobs), desc="Upcycling", unit="layer") as progress:
            for group in mixture.groups(list(first.keys)):
                tensors = [
                    {role: source.read(name).to(main) for role, name in group.names.items()} for source in opened
                ]
                made = group.make(tensors)
                del tensors
                for name in list(made):
                    tensor = made.pop(name)
                    for key, part in _stored(model, name, tensor.to(mixture.expected[name].dtype)).items():
                        writer.write(key, part.contiguous())
                progress.update(group.layer)
        for name, tensor in shared.items():
            writer.write(name, tensor)
        writer.close()
    logger.info(str(report))
    return report


def _stored(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor as `save_pretrained` would store it (stock families: one tensor for each expert)."""
    found: dict[str, torch.Tensor] = revert_weight_conversion(model, {name: tensor})
    return found


def _infos(mixture: Mixture, plan: UpcyclePlan, names: list[str]) -> dict[str, TensorInfo]:
    """All that will be written: names, types and shapes, in the order of writing."""
    replaced = {name for job in plan.jobs for name in job.sources.values()}
    kept = [name for name in names if name in mixture.expected and name not in replaced]
    added = [name for name in mixture.expected if name not in names]
    tied = set(getattr(mixture.model, "all_tied_weights_keys", None) or {})
    infos: dict[str, TensorInfo] = {}
    for name in (*kept, *(name for name in added if name not in tied)):
        for key, part in _stored(mixture.model, name, mixture.expected[name]).items():
            infos[key] = TensorInfo(part.dtype, tuple(part.shape))
    return infos
