"""Resolve and check everything before a tensor is touched: which layers, from which tensors, to which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.configuration_moe_ext import (
    ExpertsConfig,
    LayerExtension,
    MoeExtension,
    RouterConfig,
    SharedExpertsConfig,
    _from_dict,
)
from ..modeling.modeling_moe_ext import extended_class, extended_config_class
from ..modeling.moe_attention import get_attention
from ..modeling.moe_families import DenseSpec, Family, get_by_path, has_path, iter_layers
from ..modeling.moe_structure import dense_linears, dense_sizes, plan_extension
from ..modeling.router_top_k import TopKRouterConfig
from ..patching import require_family
from .gate_inits import GateRequest, get_gate_init, is_calibrated, make_gates
from .layer_jobs import LayerJob, select_layers
from .methods import ExpertStack, FeedForward, UpcyclingMethod, derive_seed, make_method
from .stock_targets import STOCK_TARGETS, stock_config, stock_family, stock_model_class


@dataclass
class UpcycleOptions:
    """The arguments that all entry points share; see `upcycle`."""

    method: str = "sparse"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    router: RouterConfig | dict[str, Any] | str | None = None
    layers: str | Sequence[int | str] = "all"
    target: Literal["auto", "stock", "ext"] = "auto"
    gate_init: str | dict[str, torch.Tensor] = "normal"
    gate_prompts: Sequence[Sequence[str]] | None = None
    negative_prompts: Sequence[Sequence[str]] | None = None
    tokenizer: Any = None
    gate_noise: float = 0.0
    seed: int = 0
    method_options: dict[str, Any] = field(default_factory=dict)
    parts: LayerExtension | dict[str, Any] | None = None
    calibration: Any = None

    def check(self) -> None:
        """Everything that can be said without the model.

        Raises:
            ValueError, TypeError: naming the argument, the value and what is allowed.
        """
        for name in ("num_experts", "num_experts_per_tok", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (0 if name == "seed" else 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must not exceed `num_experts` "
                f"({self.num_experts})."
            )
        if self.target not in ("auto", "stock", "ext"):
            raise ValueError(f'`target` must be "auto", "stock" or "ext", got {self.target!r}.')
        if self.target == "stock" and self.router is not None:
            raise ValueError(
                '`target="stock"` cannot hold a declared router; leave `router` out, or use `target="ext"`.'
            )
        if self.target == "stock" and not self.extra_parts().is_empty:
            raise ValueError('`target="stock"` cannot hold `parts`; leave them out, or use `target="ext"`.')
        if not isinstance(self.gate_init, dict):
            get_gate_init(self.gate_init)
        if self.gate_noise < 0:
            raise ValueError(f"`gate_noise` must be non-negative, got {self.gate_noise}.")

    def extra_parts(self) -> LayerExtension:
        """The declared parts beside router and experts.

        Raises:
            ValueError, TypeError: where they are malformed.
        """
        parts = self.parts
        if parts is None:
            return LayerExtension()
        if isinstance(parts, dict):
            parts = _from_dict(LayerExtension, parts, "`parts`")
        if not isinstance(parts, LayerExtension):
            raise TypeError(f"`parts` must be an object with the parts beside the router, got {parts!r}.")
        for name, instead in (("router", "`router`"), ("experts", "`num_experts` and `num_experts_per_tok`")):
            if getattr(parts, name) is not None:
                raise ValueError(f"`parts` are those beside the router; use {instead} in place of `{name}`.")
        return parts

    def check_single_source(self) -> None:
        """Raise `ValueError` for parts that only several models can fill."""
        attention = self.extra_parts().attention
        if attention is not None and get_attention(attention.type).of_models:
            raise ValueError(
                f"the attention `{attention.type}` is made of several models; use "
                f'`upcycle([seed, a, b], method="{attention.type}")` in place of `parts`.'
            )

    def router_config(self) -> RouterConfig:
        """The declared router; plain softmax, top-k, renormalised where none was given."""
        if self.router is None:
            return TopKRouterConfig()
        if isinstance(self.router, RouterConfig):
            return self.router
        return RouterConfig.from_dict({"type": self.router} if isinstance(self.router, str) else self.router)


@dataclass
class UpcyclePlan:
    """A checked conversion. `convert` is all that the three ways of converting share."""

    family: Family
    method: UpcyclingMethod
    options: UpcycleOptions
    jobs: tuple[LayerJob, ...]
    dense_layers: tuple[str, ...]
    num_experts: int
    top_k: int
    target: Literal["stock", "ext"]
    extension: MoeExtension | None = None
    stock_class: type[PreTrainedModel] | None = None
    stock_config: PreTrainedConfig | None = None
    gates: dict[str, torch.Tensor] = field(default_factory=dict)
    statistics: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    hidden_states: dict[str, torch.Tensor] = field(default_factory=dict)

    def convert(self, job: LayerJob, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The MoE tensors of one layer by name, from its dense tensors by role; same device and dtype."""
        dense = replace(job.read(tensors), statistics=self.statistics.get(job.key, {}))
        seed = derive_seed(self.options.seed, job.key, "experts")
        return self.place(job, dense, self.method.convert(dense, self.options.num_experts, seed))

    def place(self, job: LayerJob, dense: FeedForward, stack: ExpertStack) -> dict[str, torch.Tensor]:
        """The MoE tensors of one layer by name, from its experts; `dense` is the block they were made of, or the first
        of several."""
        out = {job.up: stack.up.flatten(1, 2), job.down: stack.down}
        if stack.up_bias is not None and stack.down_bias is not None:
            out |= {f"{job.up}_bias": stack.up_bias.flatten(1, 2), f"{job.down}_bias": stack.down_bias}
        router = stack.router
        if not self.method.own_gate:
            router = {"weight": self.gates[job.key].repeat_interleave(self.method.experts_per_copy, dim=0)}
        home = job.gate.rpartition(".")[0]
        out |= {f"{home}.{name}": tensor.to(dense.down) for name, tensor in router.items()}
        if stack.shared is not None:
            out |= job.name_shared(stack.shared)
        elif job.shared is not None:
            # The dense block itself, as the shared expert; the routed experts add nothing to it at first, unless both
            # are mixed.
            wanted = self.options.extra_parts().shared_experts
            if wanted is None or wanted.combine == "sum":
                out |= {name: torch.zeros_like(out[name]) for name in (job.down, f"{job.down}_bias") if name in out}
            out |= job.name_shared(dense)
        for name, shape in job.zeros.items():
            dtype = torch.float32 if name.endswith("bias") else dense.down.dtype
            out[name] = dense.down.new_zeros(shape, dtype=dtype)
        for name, shape in job.randoms.items():
            generator = torch.Generator().manual_seed(derive_seed(self.options.seed, name))
            out[name] = (0.02 * torch.randn(shape, generator=generator)).to(dense.down)
        return {name: tensor.contiguous() for name, tensor in out.items()}

    def collect(self, model: PreTrainedModel | None, keys: list[str]) -> None:
        """Run the calibration pass that the method asks for over these layers; `model` is the dense model. Once.

        Raises:
            ValueError: where there is no model to run.
        """
        collectors = self.method.collectors(self.options.num_experts)
        looks = is_calibrated(self.options.gate_init)
        if self.statistics or self.hidden_states or not (collectors or looks):
            return
        if model is None:
            raise ValueError(
                f"{_who_calibrates(self.method, self.options)} run the dense model over `calibration` data; load the "
                "model and use `upcycle`."
            )
        from ..calibration import HiddenStates, calibrate  # which needs this package

        states = HiddenStates()
        used = [*collectors.values(), *([states] if looks else [])]
        calibrate(model, self.options.calibration, used, tokenizer=self.options.tokenizer, keys=keys)
        self.hidden_states = states.rows
        self.statistics = {key: self.method.statistics(collectors, key) for key in keys}

    def make_gates(self, model: PreTrainedModel | None) -> None:
        """Make the gates' weights; `model` is the dense model for initialisations that look at it."""
        self.collect(model, [job.key for job in self.jobs])
        if self.method.own_gate:
            return
        sites = {}
        if model is not None:
            layers = {key: layer for key, layer, _ in iter_layers(model, self.family)}
            sites = {job.key: get_by_path(layers[job.key], _dense_spec(self.family).site) for job in self.jobs}
        options = self.options
        request = GateRequest(
            {job.key: job.hidden_size for job in self.jobs},
            options.num_experts,
            options.seed,
            sites,
            model,
            options.gate_prompts,
            options.negative_prompts,
            options.tokenizer,
            self.hidden_states,
        )
        self.gates = make_gates(options.gate_init, request, options.gate_noise)

    def result_class(self, dense: PreTrainedModel) -> type[PreTrainedModel]:
        """The class of the upcycled model."""
        if self.stock_class is not None:
            return self.stock_class
        stock: Any = type(dense)
        return extended_class(stock)

    def result_config(self, dense: PreTrainedModel) -> Any:
        """The config of the upcycled model."""
        if self.stock_config is not None:
            return self.stock_config
        assert self.extension is not None
        values = dense.config.to_dict()
        for name in ("model_type", "architectures"):
            values.pop(name, None)
        stock: Any = type(dense.config)
        config_class: Any = extended_config_class(stock)
        return config_class(**values, moe_ext=self.extension.to_dict())


def require_dense(model: PreTrainedModel) -> Family:
    """The family of a dense model that can be upcycled.

    Raises:
        TypeError, ValueError: for anything else, with what to do instead.
    """
    family = require_family(model)
    if "moe_link" in vars(model):
        raise ValueError(
            f"this {type(model).__name__} is a Mixture-of-Experts of ours already; upcycle the dense model."
        )
    if family.dense is None:
        raise ValueError(
            f"{type(model).__name__} is a Mixture-of-Experts already; `upcycle` starts from a dense model. "
            "`extend(model, ...)` changes its routers."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"this {type(model).__name__} carries adapters; merge or remove them before upcycling.")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"this {type(model).__name__} is quantized, and its weights cannot be copied into experts. Load it "
            "unquantized (a GGUF file with `from_gguf`), upcycle, and quantize the result."
        )
    return family


def make_plan(model: PreTrainedModel, options: UpcycleOptions) -> UpcyclePlan:
    """Check `options` against a dense model (live, or on meta) and resolve them. Nothing is changed.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    options.check()
    family = require_dense(model)
    spec = _dense_spec(family)
    method = make_method(options.method, options.method_options)
    method = method.prepared(options.num_experts, options.num_experts_per_tok)
    if method.own_gate:
        _check_own_gate(method, options)
    if options.router is None and method.default_router is not None:
        options = replace(options, router=method.default_router)
        options.check()
    if method.collectors(options.num_experts) or is_calibrated(options.gate_init):
        if options.calibration is None:
            raise ValueError(
                f"{_who_calibrates(method, options)} need `calibration`: texts, batches, or a dict of them by domain."
            )
        method.check_calibration(options.calibration, options.num_experts)
    elif options.calibration is not None:
        raise ValueError(f"these options of the method `{method.name}` do not use `calibration`; leave it out.")
    layers = {key: layer for key, layer, _ in iter_layers(model, family) if has_path(layer, spec.site)}
    keys = select_layers(options.layers, list(layers))
    skipped = tuple(key for key in layers if key not in keys)
    for key in keys:
        _check_linears(key, dense_linears(layers[key], spec))
        method.check_activation(key, get_by_path(layers[key], spec.activation))
    num_experts = options.num_experts * method.experts_per_copy
    top_k = options.num_experts_per_tok * method.experts_per_copy
    copies = options.num_experts
    dense_widths = {key: dense_sizes(layers[key], spec)[1] for key in keys}
    widths = {key: method.expert_width(width, copies) for key, width in dense_widths.items()}
    router = method.fit_router(options.router_config(), options.num_experts_per_tok, list(dense_widths.values()))
    if options.router is not None:
        options = replace(options, router=router)
    if options.gate_init == "zeros" and options.gate_noise == 0 and method.experts_per_copy > 1:
        raise ValueError(
            f'`gate_init="zeros"` makes all experts tie, and top-k would mix slices of different copies under '
            f'`method="{method.name}"`; add `gate_noise=1e-3`.'
        )
    plan = UpcyclePlan(family, method, options, (), skipped, num_experts, top_k, "ext")
    reason = ""
    parts = options.extra_parts()
    if method.makes_shared and parts.shared_experts is not None:
        raise ValueError(
            f"these options of the method `{method.name}` make shared experts themselves; leave `shared_experts` out "
            "of `parts`."
        )
    if options.target == "stock" and method.makes_shared:
        raise ValueError(
            f'`target="stock"` cannot hold the shared experts that the method `{method.name}` makes with these '
            'options; use `target="ext"`.'
        )
    if options.target != "ext" and options.router is None and parts.is_empty and not method.makes_shared:
        try:
            _plan_stock(plan, model, layers, keys, set(widths.values()))
        except ValueError as error:
            reason = str(error)
        if options.target == "stock" and reason:
            raise ValueError(f'`target="stock"` is not possible here: {reason}. Use `target="ext"`.')
    shared = dict.fromkeys(keys, method.shared_width)
    if plan.target == "ext":
        plan.extension = _make_extension(plan, dense_widths, widths, shared)
        plan_extension(model, family, plan.extension, building=True)
    if method.sizes_from_data:
        plan.collect(model, keys)
        found = {key: method.widths(dense_widths[key], copies, plan.statistics[key]) for key in keys}
        widths, shared = {key: own for key, (own, _) in found.items()}, {key: both for key, (_, both) in found.items()}
        if plan.target == "ext":
            plan.extension = _make_extension(plan, dense_widths, widths, shared)
            plan_extension(model, family, plan.extension, building=True)
    names = {id(module): name for name, module in model.named_modules()}
    plan.jobs = tuple(_make_job(key, layers[key], plan, names, shared[key] > 0) for key in keys)
    return plan


def _who_calibrates(method: UpcyclingMethod, options: UpcycleOptions) -> str:
    if method.collectors(options.num_experts):
        return f"these options of the method `{method.name}`"
    return f'gates by `gate_init="{options.gate_init}"`'


def _check_own_gate(method: UpcyclingMethod, options: UpcycleOptions) -> None:
    given = {
        "router": options.router is not None,
        "gate_init": options.gate_init != "normal",
        "gate_noise": options.gate_noise != 0,
    }
    for name, value in given.items():
        if value:
            raise ValueError(f"the method `{method.name}` makes router and gates itself; leave `{name}` out.")


def _dense_spec(family: Family) -> DenseSpec:
    assert family.dense is not None
    return family.dense


def _check_linears(key: str, linears: dict[str, nn.Module]) -> None:
    for role, module in linears.items():
        if not hasattr(module, "weight") or hasattr(module, "base_layer"):
            raise ValueError(
                f'the `{role}` projection of layer "{key}" is a {type(module).__name__}, which is not a plain linear '
                "layer. Merge adapters and upcycle the unquantized model."
            )
    has_bias = {role: getattr(module, "bias", None) is not None for role, module in linears.items()}
    if any(has_bias.values()) and not has_bias["down"]:
        raise ValueError(f'layer "{key}" has a bias before the activation but none after it, which is not supported.')


def _plan_stock(
    plan: UpcyclePlan, model: PreTrainedModel, layers: dict[str, nn.Module], keys: list[str], widths: set[int]
) -> None:
    family = stock_family(plan.family)
    if len(widths) > 1:
        raise ValueError(f"{family.name} has one expert width for all layers, these have {sorted(widths)}")
    if any("bias" in name for key in keys for name in _parameters(layers[key], plan.family)):
        raise ValueError(f"{family.name} has no biases in its experts")
    stock_class = stock_model_class(type(model), plan.family, family)
    config = stock_config(
        model.config,
        family,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        width=widths.pop(),
        dense_layers=[int(key) for key in plan.dense_layers],
    )
    plan.stock_class, plan.stock_config, plan.target = stock_class, config, "stock"


def _make_extension(
    plan: UpcyclePlan, dense_widths: dict[str, int], widths: dict[str, int], shared_widths: dict[str, int]
) -> MoeExtension:
    """The declaration. By layer key: width of the dense block, of one expert, of the shared block that the method
    makes, 0 for none."""

    def experts(key: str) -> ExpertsConfig:
        width = None if widths[key] == dense_widths[key] else widths[key]
        return ExpertsConfig(plan.num_experts, plan.top_k, width)

    parts = plan.options.extra_parts()

    def shared(key: str) -> SharedExpertsConfig | None:
        wanted, width = parts.shared_experts, dense_widths[key]
        if shared_widths[key]:
            return SharedExpertsConfig(shared_widths[key])
        if wanted is None or wanted.init != "dense":
            return wanted
        if wanted.intermediate_size not in (None, width):
            raise ValueError(
                f'`shared_experts` with `init="dense"` have the width of the dense block, {width} in layer "{key}", '
                f"not {wanted.intermediate_size}."
            )
        return replace(wanted, intermediate_size=width)

    first = next(iter(widths))
    common = experts(first), shared(first)
    exceptions: dict[str, LayerExtension | None] = {key: None for key in plan.dense_layers}
    exceptions |= {
        key: LayerExtension(experts=experts(key), shared_experts=shared(key))
        for key in widths
        if (experts(key), shared(key)) != common
    }
    return MoeExtension(
        router=plan.options.router_config(),
        experts=common[0],
        shared_experts=common[1],
        zero_experts=parts.zero_experts,
        momentum=parts.momentum,
        attention=parts.attention,
        layers=exceptions,
    )


def _parameters(layer: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """The dense block's parameters by role."""
    return {
        f"{role}.{name}": parameter
        for role, module in dense_linears(layer, _dense_spec(family)).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _make_job(key: str, layer: nn.Module, plan: UpcyclePlan, names: dict[int, str], makes_shared: bool) -> LayerJob:
    spec = _dense_spec(plan.family)
    linears = dense_linears(layer, spec)
    hidden, intermediate = dense_sizes(layer, spec)
    sources = {
        role: f"{names[id(linears[role.partition('.')[0]])]}.{role.partition('.')[2]}"
        for role in _parameters(layer, plan.family)
    }
    zeros: dict[str, tuple[int, ...]] = {}
    randoms: dict[str, tuple[int, ...]] = {}
    if plan.target == "stock":
        moe = stock_family(plan.family).moe
        assert moe is not None
        block = f"{names[id(layer)]}.{moe.block}"
        router, experts, up = f"{block}.{moe.router}", f"{block}.{moe.experts}", "gate_up_proj"
        if (bias := STOCK_TARGETS[stock_family(plan.family).name].correction_bias) is not None:
            zeros[f"{router}.{bias}"] = (1, plan.num_experts)
        if "shared_expert" in moe.shared:
            shared = f"{block}.shared_expert"
            config: Any = plan.stock_config
            size = config.shared_expert_intermediate_size
            zeros |= {f"{shared}.down_proj.weight": (hidden, size), f"{block}.shared_expert_gate.weight": (1, hidden)}
            randoms = {f"{shared}.gate_proj.weight": (size, hidden), f"{shared}.up_proj.weight": (size, hidden)}
    else:
        block = names[id(get_by_path(layer, spec.site))]
        router, experts = f"{block}.gate", f"{block}.experts"
        up = "up_proj" if set(linears) == {"up", "down"} else "gate_up_proj"
    activation = get_by_path(layer, spec.activation)
    wanted = plan.options.extra_parts().shared_experts
    made = makes_shared or (wanted is not None and wanted.init == "dense")
    return LayerJob(
        key,
        sources,
        f"{experts}.{up}",
        f"{experts}.down_proj",
        f"{router}.weight",
        hidden,
        intermediate,
        spec.transposed,
        activation,
        zeros,
        randoms,
        f"{block}.moe_shared" if made else None,
    )
