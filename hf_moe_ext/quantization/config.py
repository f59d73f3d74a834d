"""What of a model is stored in how many bits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..kernels.quantized_weights import GROUP_SIZES, PER_BYTE


METHOD = "moe_ext"


def quantization_of(config: Any) -> MoeQuantizationConfig | None:
    """How a model with this config is quantised by this package; `None` where it is not."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == METHOD:
        return MoeQuantizationConfig.from_dict(found)
    return found if isinstance(found, MoeQuantizationConfig) else None


@register_quantization_config(METHOD)
@dataclass
class MoeQuantizationConfig(QuantizationConfigMixin):
    """Stores experts, and if asked the linear layers around them, in 8, 4 or 2 bits.

    Args:
        experts (`str`, *optional*, defaults to `"nf4"`):
            Format of the experts: `"int8"`, `"int4"`, `"nf4"` or `"ternary"`; `None` leaves them as they are.
        linear (`str`, *optional*):
            Format of the `nn.Linear` layers: attention, shared experts, dense blocks. The embeddings, the language
            model's head and the routers are never quantised. `None` leaves all as they are.
        group_size (`int`, *optional*):
            Numbers with one scale, in the 4-bit formats: 32, 64 or 128; 64 where it is not given.
        zero_points (`bool`, *optional*, defaults to `False`):
            `"int4"` from the least to the largest number of a group, and not as far down as up.
        modules_to_not_convert (`list[str]`, *optional*):
            Names of modules to leave as they are: whole names, or ends or parts of them between dots, such as
            `"o_proj"` or `"layers.0"`.
        quant_method (`str`, *optional*):
            `"moe_ext"`, by which a saved model tells that it needs this package.

    Raises:
        ValueError: an unknown format, an option that no chosen format has, or nothing to quantise.

    Example:
        ```python
        >>> config = MoeQuantizationConfig(experts="nf4", linear="int8")
        >>> model = AutoModelForCausalLM.from_pretrained("my-moe", quantization_config=config)
        ```
    """

    experts: str | None = "nf4"
    linear: str | None = None
    group_size: int | None = None
    zero_points: bool = False
    modules_to_not_convert: list[str] | None = None
    quant_method: str = field(default=METHOD, kw_only=True)

    def __post_init__(self) -> None:
        if self.quant_method != METHOD:
            raise ValueError(f"`quant_method` must be {METHOD!r}, got {self.quant_method!r}.")
        for name in ("experts", "linear"):
            kind = getattr(self, name)
            if kind is not None and kind not in PER_BYTE:
                raise ValueError(f"`{name}` must be one of {', '.join(PER_BYTE)}, or None, got {kind!r}.")
        kinds = {self.experts, self.linear} - {None}
        if not kinds:
            raise ValueError("`experts` and `linear` are both None: there is nothing to quantize.")
        grouped = kinds & {"int4", "nf4"}
        if self.group_size is not None and (not grouped or self.group_size not in GROUP_SIZES):
            what = f"one of {GROUP_SIZES}" if grouped else "None, as neither int4 nor nf4 is asked for"
            raise ValueError(f"`group_size` must be {what}, got {self.group_size!r}.")
        if self.zero_points and "int4" not in kinds:
            raise ValueError("`zero_points` are for int4, which is not asked for.")
        names = self.modules_to_not_convert
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"`modules_to_not_convert` must be a list of names, got {names!r}.")

    def __str__(self) -> str:
        def part(name: str, kind: str | None) -> str:
            group = self.settings(kind).get("group_size") if kind else None
            return f"{name} {kind}" + (f" in groups of {group}" if group else "")

        parts = [
            part(name, kind) for name, kind in (("experts", self.experts), ("linear layers", self.linear)) if kind
        ]
        return ", ".join(parts)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in Transformers; unknown keys are an error, since they may come from a newer version."""
        unknown = sorted(set(config_dict) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(
                f"this quantization config has the unknown keys {unknown}; it may come from a newer hf-moe-ext."
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def settings(self, kind: str) -> dict[str, Any]:
        """Arguments of `quantize` in `kernels.quantized_weights` for one of the two formats."""
        if kind not in ("int4", "nf4"):
            return {}
        group_size = 64 if self.group_size is None else self.group_size
        return {"group_size": group_size} | ({"zero_points": True} if self.zero_points and kind == "int4" else {})
