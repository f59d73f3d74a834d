"""Optional dependencies: is one there, and what to say when it is not.

The packages themselves are imported inside the functions that need them, so that `import hf_moe_ext` stays cheap.
"""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version


# Import name -> (lowest version that works, extra that installs it). `None`: transformers checks the version itself.
_OPTIONAL: dict[str, tuple[str | None, str]] = {
    "bitsandbytes": ("0.46.1", "bitsandbytes"),
    "gguf": ("0.10.0", "gguf"),
    "kernels": (None, "kernels"),
    "matplotlib": ("3.8", "plot"),
    "tensorboard": ("2.15", "tensorboard"),
    "trackio": ("0.5", "trackio"),
    "triton": ("3.4", "triton"),
    "trl": ("1.16", "trl"),
}


@lru_cache
def _installed_version(name: str) -> str | None:
    """Version of the installed package `name`, or `None`. Imports nothing.

    A folder of that name without code does not count: in the root of a checkout `kernels` is found as a namespace.
    """
    try:
        spec = find_spec(name)
    except ValueError:  # a module that somebody put into sys.modules without a spec
        return None
    if spec is None or spec.origin is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_available(name: str) -> bool:
    """Whether the optional package `name` is installed in a version that works here."""
    lowest, _ = _OPTIONAL[name]
    found = _installed_version(name)
    return found is not None and (lowest is None or Version(found) >= Version(lowest))


def require(name: str, purpose: str) -> None:
    """Raise an `ImportError` that says how to install the optional package `name`, unless it is available.

    Args:
        name: import name of the package.
        purpose: what needs it, as the subject of a sentence ("Drawing routing pictures").
    """
    if is_available(name):
        return
    lowest, extra = _OPTIONAL[name]
    found = _installed_version(name)
    wanted = f"`{name}`" if lowest is None else f"`{name}>={lowest}`"
    state = "which is not installed" if found is None else f"but version {found} is installed"
    raise ImportError(f'{purpose} needs {wanted}, {state}. Install it with: pip install "hf-moe-ext[{extra}]"')


def is_bitsandbytes_available() -> bool:
    return is_available("bitsandbytes")


def is_gguf_available() -> bool:
    return is_available("gguf")


def is_kernels_available() -> bool:
    return is_available("kernels")


def is_matplotlib_available() -> bool:
    return is_available("matplotlib")


def is_tensorboard_available() -> bool:
    return is_available("tensorboard")


def is_trackio_available() -> bool:
    return is_available("trackio")


def is_triton_available() -> bool:
    return is_available("triton")


def is_trl_available() -> bool:
    return is_available("trl")
