"""Mixture-of-Experts for Hugging Face Transformers.

Importing the package registers its model classes with `AutoConfig` and `AutoModel*`, and `"moe_ext"` as a way of
expert parallelism and of quantisation, and does nothing else: every public name below is imported when it is first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .kernels.experts import register_experts as _register_experts
from .modeling import modeling_moe_ext as _registered  # noqa: F401
from .modeling.moe_models import register_own_models as _register_own_models


__version__ = "0.1.0"

_register_own_models()
# After the models: the portable function that they register under the name "moe_ext" becomes the fallback.
_register_experts()
# After the kernels, under another name of which quantised experts are found.
import_module(f"{__name__}.quantization")

# Public name -> the submodule that defines it. A new name is added here and under TYPE_CHECKING. It must not be the
# name of a submodule: importing that submodule would put the module in its place.
_PUBLIC = {
    "ActDTSRouterConfig": "modeling.router_act_dts",
    "AdaMoERouterConfig": "modeling.router_adamoe",
    "BamAttentionConfig": "modeling.attention_bam",
    "CapacityConfig": "modeling.configuration_parts",
    "CometRouterConfig": "modeling.router_comet",
    "DSelectKRouterConfig": "modeling.router_dselect_k",
    "DTSRouterConfig": "modeling.router_dts",
    "DeepSeekMoERouterConfig": "modeling.router_deepseek_moe",
    "ExpertChoiceRouterConfig": "modeling.router_expert_choice",
    "ExpertLoraConfig": "modeling.configuration_parts",
    "ExpertsConfig": "modeling.configuration_moe_ext",
    "HashRouterConfig": "modeling.router_hash",
    "LoraExpertsConfig": "modeling.configuration_moe_ext",
    "MoEPlusPlusRouterConfig": "modeling.router_moe_plus_plus",
    "MoERouter": "modeling.moe_router",
    "MoETrainer": "trainers",
    "MoETrainingArguments": "trainers",
    "MoEficationRouterConfig": "modeling.router_moefication",
    "ModuleFormerConfig": "modeling.modeling_moduleformer",
    "ModuleFormerForCausalLM": "modeling.modeling_moduleformer",
    "ModuleFormerRouterConfig": "modeling.router_moduleformer",
    "MoeExtension": "modeling.configuration_moe_ext",
    "MoeQuantizationConfig": "quantization",
    "MomentumConfig": "modeling.configuration_parts",
    "MonetConfig": "modeling.modeling_monet",
    "MonetForCausalLM": "modeling.modeling_monet",
    "NoisyTopKRouterConfig": "modeling.router_noisy_top_k",
    "PermutedTopKRouterConfig": "modeling.router_permuted_top_k",
    "PreGatedRouterConfig": "modeling.router_pre_gated",
    "RMoERouterConfig": "modeling.router_rmoe",
    "RandomFixedRouterConfig": "modeling.router_random_fixed",
    "ReadMeRouterConfig": "modeling.router_read_me",
    "ReadMeTuningArguments": "trainers",
    "RouteRecord": "modeling.moe_context",
    "RoutedAttentionConfig": "modeling.attention_routed",
    "RouterConfig": "modeling.configuration_moe_ext",
    "RouterDistillation": "trainers",
    "RouterSite": "modeling.moe_router",
    "RoutingContext": "modeling.moe_context",
    "RoutingReplayCollator": "trainers",
    "SharedExpertsConfig": "modeling.configuration_parts",
    "SigmoidRouterConfig": "modeling.router_sigmoid",
    "SoftMoERouterConfig": "modeling.router_soft_moe",
    "StochasticRouterConfig": "modeling.router_stochastic",
    "TopKRouterConfig": "modeling.router_top_k",
    "TopPRouterConfig": "modeling.router_top_p",
    "UnionAttentionConfig": "modeling.attention_union",
    "UnionRouterConfig": "modeling.router_union",
    "XMoERouterConfig": "modeling.router_xmoe",
    "ZeroExpertsConfig": "modeling.configuration_parts",
    "active_adapters": "lora.mixtures",
    "add_adapter": "lora.mixtures",
    "aggregate_experts": "aggregation",
    "calibrate": "calibration",
    "convert_moduleformer_checkpoint": "moduleformer_checkpoint",
    "deepspeed_config": "autoep",
    "describe": "patching",
    "disable_adapter": "lora.mixtures",
    "expert_usage": "usage",
    "export": "hub",
    "export_adapters": "lora.saving",
    "export_expert_lora": "lora.expert_layouts",
    "extend": "patching",
    "from_gguf": "gguf",
    "insert_experts": "module_editing",
    "list_families": "modeling.moe_families",
    "load_adapters": "lora.saving",
    "load_expert_lora": "lora.expert_layouts",
    "merge_and_unload": "lora.merging",
    "mix_adapters": "lora.mixtures",
    "prune_experts": "module_editing",
    "quantize": "quantization",
    "record_routing": "modeling.moe_replay",
    "register_router": "modeling.moe_router",
    "replay_routing": "modeling.moe_replay",
    "report": "reporting",
    "restore": "patching",
    "route_rows": "modeling.moe_structure",
    "route_tasks": "lora.mixtures",
    "save_adapters": "lora.saving",
    "select_data": "lora.data_selection",
    "select_experts": "lora.selection",
    "set_adapter": "lora.mixtures",
    "trace_routing": "modeling.moe_structure",
    "train_new_experts": "module_editing",
    "tune_read_me": "trainers",
    "upcycle": "upcycling",
    "upcycle_checkpoint": "upcycling",
}

if TYPE_CHECKING:  # for type checkers and editors; `as` marks a name as public
    from .aggregation import aggregate_experts as aggregate_experts
    from .autoep import deepspeed_config as deepspeed_config
    from .calibration import calibrate as calibrate
    from .gguf import from_gguf as from_gguf
    from .hub import export as export
    from .lora.data_selection import select_data as select_data
    from .lora.expert_layouts import export_expert_lora as export_expert_lora
    from .lora.expert_layouts import load_expert_lora as load_expert_lora
    from .lora.merging import merge_and_unload as merge_and_unload
    from .lora.mixtures import active_adapters as active_adapters
    from .lora.mixtures import add_adapter as add_adapter
    from .lora.mixtures import disable_adapter as disable_adapter
    from .lora.mixtures import mix_adapters as mix_adapters
    from .lora.mixtures import route_tasks as route_tasks
    from .lora.mixtures import set_adapter as set_adapter
    from .lora.saving import export_adapters as export_adapters
    from .lora.saving import load_adapters as load_adapters
    from .lora.saving import save_adapters as save_adapters
    from .lora.selection import select_experts as select_experts
    from .modeling.attention_bam import BamAttentionConfig as BamAttentionConfig
    from .modeling.attention_routed import RoutedAttentionConfig as RoutedAttentionConfig
    from .modeling.attention_union import UnionAttentionConfig as UnionAttentionConfig
    from .modeling.configuration_moe_ext import ExpertsConfig as ExpertsConfig
    from .modeling.configuration_moe_ext import LoraExpertsConfig as LoraExpertsConfig
    from .modeling.configuration_moe_ext import MoeExtension as MoeExtension
    from .modeling.configuration_moe_ext import RouterConfig as RouterConfig
    from .modeling.configuration_parts import CapacityConfig as CapacityConfig
    from .modeling.configuration_parts import ExpertLoraConfig as ExpertLoraConfig
    from .modeling.configuration_parts import MomentumConfig as MomentumConfig
    from .modeling.configuration_parts import SharedExpertsConfig as SharedExpertsConfig
    from .modeling.configuration_parts import ZeroExpertsConfig as ZeroExpertsConfig
    from .modeling.modeling_moduleformer import ModuleFormerConfig as ModuleFormerConfig
    from .modeling.modeling_moduleformer import ModuleFormerForCausalLM as ModuleFormerForCausalLM
    from .modeling.modeling_monet import MonetConfig as MonetConfig
    from .modeling.modeling_monet import MonetForCausalLM as MonetForCausalLM
    from .modeling.moe_context import RouteRecord as RouteRecord
    from .modeling.moe_context import RoutingContext as RoutingContext
    from .modeling.moe_families import list_families as list_families
    from .modeling.moe_replay import record_routing as record_routing
    from .modeling.moe_replay import replay_routing as replay_routing
    from .modeling.moe_router import MoERouter as MoERouter
    from .modeling.moe_router import RouterSite as RouterSite
    from .modeling.moe_router import register_router as register_router
    from .modeling.moe_structure import route_rows as route_rows
    from .modeling.moe_structure import trace_routing as trace_routing
    from .modeling.router_act_dts import ActDTSRouterConfig as ActDTSRouterConfig
    from .modeling.router_adamoe import AdaMoERouterConfig as AdaMoERouterConfig
    from .modeling.router_comet import CometRouterConfig as CometRouterConfig
    from .modeling.router_deepseek_moe import DeepSeekMoERouterConfig as DeepSeekMoERouterConfig
    from .modeling.router_dselect_k import DSelectKRouterConfig as DSelectKRouterConfig
    from .modeling.router_dts import DTSRouterConfig as DTSRouterConfig
    from .modeling.router_expert_choice import ExpertChoiceRouterConfig as ExpertChoiceRouterConfig
    from .modeling.router_hash import HashRouterConfig as HashRouterConfig
    from .modeling.router_moduleformer import ModuleFormerRouterConfig as ModuleFormerRouterConfig
    from .modeling.router_moe_plus_plus import MoEPlusPlusRouterConfig as MoEPlusPlusRouterConfig
    from .modeling.router_moefication import MoEficationRouterConfig as MoEficationRouterConfig
    from .modeling.router_noisy_top_k import NoisyTopKRouterConfig as NoisyTopKRouterConfig
    from .modeling.router_permuted_top_k import PermutedTopKRouterConfig as PermutedTopKRouterConfig
    from .modeling.router_pre_gated import PreGatedRouterConfig as PreGatedRouterConfig
    from .modeling.router_random_fixed import RandomFixedRouterConfig as RandomFixedRouterConfig
    from .modeling.router_read_me import ReadMeRouterConfig as ReadMeRouterConfig
    from .modeling.router_rmoe import RMoERouterConfig as RMoERouterConfig
    from .modeling.router_sigmoid import SigmoidRouterConfig as SigmoidRouterConfig
    from .modeling.router_soft_moe import SoftMoERouterConfig as SoftMoERouterConfig
    from .modeling.router_stochastic import StochasticRouterConfig as StochasticRouterConfig
    from .modeling.router_top_k import TopKRouterConfig as TopKRouterConfig
    from .modeling.router_top_p import TopPRouterConfig as TopPRouterConfig
    from .modeling.router_union import UnionRouterConfig as UnionRouterConfig
    from .modeling.router_xmoe import XMoERouterConfig as XMoERouterConfig
    from .module_editing import insert_experts as insert_experts
    from .module_editing import prune_experts as prune_experts
    from .module_editing import train_new_experts as train_new_experts
    from .moduleformer_checkpoint import convert_moduleformer_checkpoint as convert_moduleformer_checkpoint
    from .patching import describe as describe
    from .patching import extend as extend
    from .patching import restore as restore
    from .quantization import MoeQuantizationConfig as MoeQuantizationConfig
    from .quantization import quantize as quantize
    from .reporting import report as report
    from .trainers import MoETrainer as MoETrainer
    from .trainers import MoETrainingArguments as MoETrainingArguments
    from .trainers import ReadMeTuningArguments as ReadMeTuningArguments
    from .trainers import RouterDistillation as RouterDistillation
    from .trainers import RoutingReplayCollator as RoutingReplayCollator
    from .trainers import tune_read_me as tune_read_me
    from .upcycling import upcycle as upcycle
    from .upcycling import upcycle_checkpoint as upcycle_checkpoint
    from .usage import expert_usage as expert_usage

__all__ = sorted(_PUBLIC)


def _expert_parallel(*args: Any) -> Any:
    """Stands for the class `MoeExtEP`, which is imported when the first layer asks for it."""
    return import_module(f"{__name__}.expert_parallel").MoeExtEP(*args)


try:
    from transformers.distributed.expert_parallel import EPImplementationInterface
except ImportError:  # before transformers 5.23
    pass
else:
    EPImplementationInterface.register("moe_ext", _expert_parallel)
    del EPImplementationInterface


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
