"""Models whose experts are in few bits: the config, and the quantizer that Transformers calls while it loads."""

from .config import MoeQuantizationConfig
from .live import quantize, quantized_size
from .quantizer import MoeQuantizer


__all__ = ["MoeQuantizationConfig", "MoeQuantizer", "quantize", "quantized_size"]
