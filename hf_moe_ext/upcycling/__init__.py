"""Dense models to Mixture-of-Experts.

A new method is one file with a class registered by `register_upcycling_method`, and one import line below.
"""

from .bam import upcycle_bam, upcycle_btx
from .checkpoint import upcycle_checkpoint
from .drop import DropUpcycling
from .gate_inits import GateRequest, list_gate_inits, register_gate_init
from .granular import GranularUpcycling
from .jetmoe import jetmoe_config, jetmoe_extension, load_jetmoe, upcycle_to_jetmoe
from .live import upcycle
from .loading import load_upcycled
from .masked import MaskedUpcycling
from .methods import ExpertStack, FeedForward, UpcyclingMethod, list_methods, register_upcycling_method
from .moefication import MoEficationUpcycling
from .read_me import ReadMeUpcycling
from .report import UpcycleReport
from .sparse import SparseUpcycling
from .split import SplitUpcycling
from .to_dense import to_dense
from .union import UnionUpcycling


__all__ = [
    "DropUpcycling",
    "ExpertStack",
    "FeedForward",
    "GateRequest",
    "GranularUpcycling",
    "MaskedUpcycling",
    "MoEficationUpcycling",
    "ReadMeUpcycling",
    "SparseUpcycling",
    "SplitUpcycling",
    "UnionUpcycling",
    "UpcycleReport",
    "UpcyclingMethod",
    "list_gate_inits",
    "jetmoe_config",
    "jetmoe_extension",
    "list_methods",
    "load_jetmoe",
    "load_upcycled",
    "register_gate_init",
    "register_upcycling_method",
    "to_dense",
    "upcycle",
    "upcycle_bam",
    "upcycle_btx",
    "upcycle_checkpoint",
    "upcycle_to_jetmoe",
]
