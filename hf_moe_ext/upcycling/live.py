"""Upcycling a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..modeling.configuration_moe_ext import LayerExtension, RouterConfig, _parts_to_dict
from ..modeling.moe_experts import MoeExtGate
from ..modeling.moe_families import get_family
from ..modeling.moe_parts import PartModule
from ..modeling.moe_router import MoERouter
from ..patching import describe, install
from .layer_jobs import LayerJob
from .methods import derive_seed, method_class, run_model_method
from .plan import UpcycleOptions, UpcyclePlan, make_plan
from .report import UpcycleReport, check_inputs, compare, outputs, rounding_tolerance, worst


logger = logging.get_logger(__name__)


def upcycle(
    dense: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path],
    method: str = "sparse",
    *,
    num_experts: int | None = None,
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
    calibration: Any = None,
    seed: int = 0,
    inplace: bool = False,
    check: bool | str | list[str] | dict[str, torch.Tensor] = True,
    **method_options: Any,
) -> PreTrainedModel:
    """Make a Mixture-of-Experts of a dense model.

    A model given as an object is left as it is: the result has tensors of its own, so peak memory is both models. With
    `inplace=True` the object itself becomes the MoE, layer by layer. A model given by name is loaded for the purpose.
    For models larger than memory see `upcycle_checkpoint` and `load_upcycled`.

    Args:
        dense (`PreTrainedModel` or `str`, or a `list` of them):
            The dense model, a folder, or a name on the Hub. Several of one seed, the seed first, for `"bam"` and
            `"btx"`.
        method (`str`, *optional*, defaults to `"sparse"`):
            `"sparse"`, `"granular"`, `"drop"`, `"masked"`, `"split"`, `"moefication"`, `"read_me"`; `"bam"` and
            `"btx"` for several models; `"jetmoe"`; or what `register_upcycling_method` added. Its own options are
            further keyword arguments.
        num_experts (`int`, *optional*):
            Copies of each feed-forward block, 8 unless the method has another default (`"read_me"`: one for each
            domain).
        num_experts_per_tok (`int`, *optional*):
            Copies that a token uses, 2 unless the method has another default. Methods that cut a copy into slices have
            more experts, and use more, by that factor.
        router (`RouterConfig`, `dict` or `str`, *optional*):
            Router of the result. `None` is plain top-k: softmax, top-k, renormalised, under which copies are exact.
        parts (`LayerExtension` or `dict`, *optional*):
            What else the layers get: `zero_experts`, `shared_experts`, `momentum`, such as
            `{"shared_experts": {"init": "dense"}}` for a copy of each dense block beside its experts.
        layers (`str` or `list`, *optional*, defaults to `"all"`):
            Layers to convert: `"all"`, `"every:2"` (0, 2, ...), `"every:2:1"` (1, 3, ...), or a list of indices or
            layer keys (`"encoder.3"`). The others stay dense.
        target (`"auto"`, `"stock"` or `"ext"`, *optional*, defaults to `"auto"`):
            `"stock"` gives an instance of a stock MoE class of transformers (llama -> mixtral, ...), which loads
            without this package; an error says why where that is not possible. `"ext"` gives our registered class.
            `"auto"` is `"stock"` where that is possible, no router and no parts are declared, and `inplace` is off.
        gate_init (`str` or `dict`, *optional*, defaults to `"normal"`):
            `"normal"`, `"uniform"`, `"zeros"`, `"centroid"`, `"hidden"`, `"hidden_avg"`, `"cheap_embed"`, what
            `register_gate_init` added, or (num_experts, hidden) tensors by layer key.
        gate_prompts, negative_prompts (`list[list[str]]`, *optional*):
            For the last three: texts that belong, and do not belong, to each expert.
        tokenizer (*optional*):
            For prompts and texts; loaded from `dense` where that is a name.
        gate_noise (`float`, *optional*, defaults to 0.0):
            Standard deviation of noise added to the gates.
        calibration (*optional*):
            Data for methods and gates that look at activations: texts, batches with `input_ids`, or a dict of these by
            domain (see `hf_moe_ext.calibration`).
        seed (`int`, *optional*, defaults to 0):
            Of all that is random. Equal seeds give equal tensors on every device.
        inplace (`bool`, *optional*, defaults to `False`):
            Whether to convert the given object. If that fails midway (out of memory), the object is unusable.
        check (`bool`, `str`, `list[str]` or `dict`, *optional*, defaults to `True`):
            Compare the logits of dense and MoE model on a random batch, on texts (the worst one counts), or on the
            given forward arguments.

    Returns:
        The MoE model, with an `UpcycleReport` as its attribute `upcycle_report`.

    Raises:
        TypeError, ValueError: where arguments do not fit each other or the model. Nothing has been changed then.

    Example:
        ```python
        >>> model = upcycle(dense, num_experts=4, router=TopPRouterConfig(threshold=0.4, renormalize=True))
        >>> print(model.upcycle_report)
        ```
    """
    made = run_model_method(
        method,
        dense,
        {
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "router": router,
            "parts": parts,
            "layers": None if layers == "all" else layers,
            "target": None if target == "auto" else target,
            "gate_init": None if gate_init == "normal" else gate_init,
            "gate_prompts": gate_prompts,
            "negative_prompts": negative_prompts,
            "tokenizer": tokenizer,
            "gate_noise": gate_noise or None,
            "calibration": calibration,
            "seed": seed or None,
            "inplace": inplace,
            "check": None if check is True else check,
        },
        method_options,
    )
    if made is not None:
        return made
    if not isinstance(dense, (str, Path, PreTrainedModel)) and isinstance(dense, Sequence):
        raise ValueError(f'several models are mixed by `method="bam"` and `method="btx"`, not by "{method}".')
    options = UpcycleOptions(
        method,
        *method_class(method).counts(num_experts, num_experts_per_tok, calibration),
        router,
        layers,
        "ext" if target == "auto" and inplace else target,
        gate_init,
        gate_prompts,
        negative_prompts,
        tokenizer,
        gate_noise,
        seed,
        method_options,
        parts,
        calibration,
    )
    options.check()
    options.check_single_source()
    if inplace and target == "stock":
        raise ValueError(
            '`inplace=True` keeps the object and its modules, `target="stock"` is another class; drop one.'
        )
    owned = isinstance(dense, (str, Path))
    if isinstance(dense, (str, Path)):
        if options.tokenizer is None and (gate_prompts or calibration or isinstance(check, (str, list))):
            options.tokenizer = AutoTokenizer.from_pretrained(dense)
        dense = load_dense(dense)
    plan = make_plan(dense, options)
    _refuse_hooks(dense)
    report = make_report(plan, dense)
    batches = [] if check is False else _batches(dense, check, options)
    references = [outputs(dense, batch) for batch in batches]
    plan.make_gates(dense)
    if plan.target == "ext":
        model = _to_ext(dense, plan, inplace or owned)
    else:
        model = _to_stock(dense, plan)
    finish_report(report, model)
    if batches:
        pairs = zip(references, (outputs(model, batch)[0] for batch in batches), strict=True)
        differences = [compare(dense_out, moe_out, logits=logits) for (dense_out, logits), moe_out in pairs]
        measured = "logits" if references[0][1] else "hidden states"
        report.record(measured, worst(differences), rounding_tolerance(model.dtype))
    model.upcycle_report = report
    logger.info(str(report))
    return model


def load_dense(source: str | Path) -> PreTrainedModel:
    """The model saved at `source` in the class and precision it was saved in."""
    return dense_class(AutoConfig.from_pretrained(source), source).from_pretrained(source, dtype="auto")


def dense_class(config: Any, source: str | Path) -> Any:
    """The stock class named in a config.

    Raises:
        ValueError: where the config names none, or one of an unsupported architecture.
    """
    family = get_family(config.model_type)
    names = config.architectures or []
    if family is None or config.model_type.startswith("moe_ext_"):
        what = "is upcycled already" if family else "is not supported; `hf-moe list families` shows those that are"
        raise ValueError(f"the architecture `{config.model_type}` of {source} {what}.")
    found = next((getattr(family.modeling_module(), n) for n in names if hasattr(family.modeling_module(), n)), None)
    if found is None:
        raise ValueError(
            f"the config of {source} names no class of transformers (`architectures` is {names}). Load the model "
            "yourself and pass the object."
        )
    return found


def make_report(plan: UpcyclePlan, dense: PreTrainedModel) -> UpcycleReport:
    """The report, as far as it is known before the conversion."""
    options = plan.options
    extension = plan.extension
    return UpcycleReport(
        method=plan.method.name,
        method_options=plan.method.to_dict(),
        source=str(dense.config._name_or_path or ""),
        source_class=type(dense).__name__,
        result_class="",
        target=plan.target,
        num_experts=plan.num_experts,
        num_experts_per_tok=plan.top_k,
        layers=[job.key for job in plan.jobs],
        dense_layers=list(plan.dense_layers),
        router=extension.router.to_dict() if extension is not None and extension.router is not None else None,
        parts=_parts_to_dict(options.extra_parts()),
        gate_init=plan.method.own_gate or (options.gate_init if isinstance(options.gate_init, str) else "tensors"),
        seed=options.seed,
        parameters_before=sum(p.numel() for p in dense.parameters()),
    )


def finish_report(report: UpcycleReport, model: PreTrainedModel) -> None:
    """Enter what the resulting model (live or on meta) shows."""
    description = describe(model)
    report.result_class = type(model).__name__
    report.parameters_after, report.active_parameters = description.parameters, description.active_parameters


def _batches(dense: PreTrainedModel, check: Any, options: UpcycleOptions) -> list[dict[str, torch.Tensor]]:
    if isinstance(check, dict):
        return [{name: value.to(dense.device) for name, value in check.items()}]
    if check is True:
        return [check_inputs(dense, options.seed)]
    if options.tokenizer is None:
        raise ValueError("`check` with texts needs `tokenizer=...`.")
    batches = []
    for text in [check] if isinstance(check, str) else check:  # one by one: not every tokenizer can pad
        ids = torch.tensor([options.tokenizer(text)["input_ids"]], device=dense.device)
        batches.append({"input_ids": ids, **({"decoder_input_ids": ids} if dense.config.is_encoder_decoder else {})})
    return batches


def _refuse_hooks(dense: PreTrainedModel) -> None:
    if any("forward" in vars(module) or hasattr(module, "_hf_hook") for module in dense.modules()):
        raise ValueError(
            "the dense model is dispatched over devices by accelerate. Upcycle before that, or load the dense "
            "checkpoint with `load_upcycled(..., device_map=...)`."
        )


def _take_parameters(model: PreTrainedModel, plan: UpcyclePlan) -> dict[str, dict[str, nn.Parameter]]:
    """The dense parameters of the layers to convert, by layer key and role."""
    return {job.key: {role: model.get_parameter(name) for role, name in job.sources.items()} for job in plan.jobs}


def _to_ext(dense: PreTrainedModel, plan: UpcyclePlan, inplace: bool) -> PreTrainedModel:
    taken = _take_parameters(dense, plan)
    placeholders = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameters in taken.values()
        for parameter in parameters.values()
    }
    if inplace:
        model = dense
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in placeholders:
                    module._parameters[name] = placeholders[id(parameter)]
    else:
        # The copy gets empty stand-ins for what is about to be replaced, so the dense blocks are never copied.
        model = copy.deepcopy(dense, memo=dict(placeholders))
    assert plan.extension is not None
    install(model, plan.family, plan.extension, building=True)
    for job in tqdm(plan.jobs, desc="Upcycling", unit="layer"):
        parameters = taken.pop(job.key)
        tensors = plan.convert(job, {role: parameter.detach() for role, parameter in parameters.items()})
        trainable = any(parameter.requires_grad for parameter in parameters.values())
        del parameters
        fill_created(model, job, plan.options.seed, tensors[job.gate])
        for name, tensor in tensors.items():
            owner, _, attribute = name.rpartition(".")
            if name != job.gate:
                model.get_submodule(owner)._parameters[attribute] = nn.Parameter(tensor, trainable)
    fill_parts(model, plan.options.seed, dense.device)
    plan.method.finish(model, plan.statistics)
    return model


def fill_created(model: PreTrainedModel, job: LayerJob, seed: int, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give the router of one layer, which is on meta, its weight, and initialise what the extension adds to the block.

    Returns:
        The tensors of the router and of all that was added, by name.
    """
    name = job.gate.rpartition(".")[0]
    block_name = name.rpartition(".")[0]
    gate, block = model.get_submodule(name), model.get_submodule(block_name)
    trained = next(gate.parameters()).requires_grad
    gate.to_empty(device=weight.device)
    gate.weight = nn.Parameter(weight, trained)
    if isinstance(gate, MoERouter):
        seeded_reset(gate, name, seed)
    tensors = {f"{name}.{key}": tensor for key, tensor in gate.state_dict().items()}
    return tensors | fill_parts(block, seed, weight.device, prefix=block_name)


def fill_parts(
    root: nn.Module, seed: int, device: torch.device | str, prefix: str = "", skip: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Initialise the parts and the routers in attention that the extension added, but for names that begin with
    `skip`.

    Returns:
        The tensors of all that was added, by name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, module in iter_added(root, prefix):
        in_attention = isinstance(module, MoERouter) and bool(module.moe_site.group)
        if (isinstance(module, PartModule) or in_attention) and not (skip and path.startswith(skip)):
            if any(tensor.is_meta for tensor in module.state_dict().values()):
                module.to_empty(device=device)
                seeded_reset(module, path, seed)
            elif in_attention:  # made on the device of its attention, with weights that do not follow the seed
                seeded_reset(module, path, seed)
            tensors |= {f"{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors


def iter_added(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, MoERouter | PartModule]]:
    """The routers, and the parts that do not belong to one, with their names."""
    routers: list[str] = []
    for path, module in root.named_modules(prefix=prefix):
        if isinstance(module, MoERouter):
            routers.append(f"{path}.")
        if isinstance(module, (MoERouter, PartModule)) and not path.startswith(tuple(routers) or ("\0",)):
            yield path, module


def _to_stock(dense: PreTrainedModel, plan: UpcyclePlan) -> PreTrainedModel:
    replaced = {name for job in plan.jobs for name in job.sources.values()}
    state = {name: tensor.detach().clone() for name, tensor in dense.state_dict().items() if name not in replaced}
    taken = _take_parameters(dense, plan)
    for job in tqdm(plan.jobs, desc="Upcycling", unit="layer"):
        state |= plan.convert(job, {role: parameter.detach() for role, parameter in taken[job.key].items()})
    assert plan.stock_class is not None
    device = {} if dense.device.type == "cpu" else {"device_map": {"": dense.device}}
    model = plan.stock_class.from_pretrained(
        None, config=plan.stock_config, state_dict=state, dtype=dense.dtype, **device
    )
    vars(model).pop("_weight_conversions", None)  # none was used, so saving would not use the usual ones either
    if dense.can_generate():
        model.generation_config = copy.deepcopy(dense.generation_config)
    model.config._name_or_path = dense.config._name_or_path
    trainable = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, True))
    for job in plan.jobs:
        for name in (job.up, job.down):
            model.get_parameter(name).requires_grad_(any(trainable[source] for source in job.sources.values()))
    return model.train(dense.training)


def seeded_reset(module: MoERouter | PartModule, name: str, seed: int) -> None:
    """Initialise what an extension added, from a seed of its own; the global generators are left alone."""
    device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, name))
        if isinstance(module, MoERouter) and isinstance(module, MoeExtGate) and bool(module.moe_site.group):
            MoeExtGate.init_weights(module, 0.02)  # elsewhere the gate's weights are made by `gate_init`
        module.init_weights(0.02)
