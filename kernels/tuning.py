"""Sizes that were measured on a device: a table, and what is taken from it. Plain Python: nothing is timed here.

Nothing is tuned while a model runs. A kernel that is given no config asks `config_for`, which looks for the nearest
measured sizes in two tables, the user's (`hf-moe kernels tune` writes it) and the one that comes with the package, and
falls back to a rule. A key has no number of tokens in it, only the power of two of the rows of an expert, so no length
of a sequence is a new one.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeAlias, TypeVar

import torch

from .decode_config import DecodeConfig
from .expert_weights import ExpertWeights
from .tile_config import KernelConfig, next_power_of_2


Config: TypeAlias = KernelConfig | DecodeConfig
_Config = TypeVar("_Config", KernelConfig, DecodeConfig)

FORMAT = 1
KERNELS = ("up", "up_kept", "down", "down_backward", "weight_gradient", "decode")
DTYPES = ("float32", "tf32", "float16", "bfloat16")
SHIPPED = Path(__file__).with_name("tuned.json")
MAX_ROWS = 1024


@dataclass(frozen=True)
class Key:
    """What a measured config belongs to.

    Args:
        device: name of the GPU, as PyTorch gives it.
        kernel: one of `KERNELS`.
        transposed: whether weights lie dense along another axis than the contraction. Of "weight_gradient": whether
            its rows are those of tokens.
        dtype: one of `DTYPES`; "tf32" is float32 whose products are rounded.
        n, k: the two sizes of the matrix. "up", and "up_kept" where the projection itself is kept for backward: 2I (I
            without a gate) and H; "down": H and I, and for the gradient of
            the input, which is the same kernel, H and 2I; "down_backward": I and H; "weight_gradient": rows and
            columns of the gradient; "decode": H and I.
        rows: rows of an expert, a power of 2 from 1 to `MAX_ROWS`.

    Raises:
        ValueError: for a value that is none of these.
    """

    device: str
    kernel: str
    transposed: bool
    dtype: str
    n: int
    k: int
    rows: int

    def __post_init__(self) -> None:
        for name, allowed in (("kernel", KERNELS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        if not isinstance(self.device, str) or not isinstance(self.transposed, bool):
            raise ValueError(f"`device` must be a name and `transposed` a truth value, got {self}.")
        for name in ("n", "k", "rows"):
            number = getattr(self, name)
            if type(number) is not int or number < 1:
                raise ValueError(f"`{name}` must be a positive number, got {number!r}.")
        if self.rows != bucket(self.rows):
            raise ValueError(f"`rows` must be a power of 2 up to {MAX_ROWS}, got {self.rows}.")


@dataclass(frozen=True)
class Entry:
    """A measured config, with the time that it took.

    Args:
        key: what was measured.
        config: the fastest; `DecodeConfig` for "decode".
        microseconds: median of one launch.
        default_microseconds: the same for the config of the rule.
    """

    key: Key
    config: Config
    microseconds: float
    default_microseconds: float


def bucket(rows: int) -> int:
    """The power of two that rows of an expert count as: 1 to `MAX_ROWS`."""
    return min(max(next_power_of_2(rows), 1), MAX_ROWS)


def dtype_name(dtype: torch.dtype) -> str:
    """A data type as the tables have it; float32 depends on what PyTorch may do with its products."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The name of a GPU; the type of any other device."""
    return _gpu_name(device) if device.type == "cuda" else device.type


@functools.lru_cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


# Looking up ---------------------------------------------------------------------------------------------------------


def config_for(key: Key, default: Callable[[], _Config]) -> _Config:
    """The config that a kernel runs with where it is given none: a measured one, else by rule.

    Args:
        key: what it is to compute.
        default: the rule.

    Raises:
        ValueError: a table cannot be read; the message names the file.
    """
    found = lookup(key)
    return default() if found is None else found  # type: ignore[return-value]


def expert_key(kernel: str, weights: ExpertWeights, num_slots: int) -> Key:
    """The key of a kernel that reads the weights of experts.

    Args:
        kernel: any of `KERNELS` but "weight_gradient".
        weights: the experts.
        num_slots: S.
    """
    hidden, intermediate, last = weights.hidden_size, weights.intermediate_size, 1 if weights.is_transposed else 2
    is_up = kernel in ("up", "up_kept")
    matrix = weights.up if is_up else weights.down
    if is_up:
        n, k = matrix.shape[3 - last], matrix.shape[last]
    else:
        n, k = (intermediate, hidden) if kernel == "down_backward" else (hidden, intermediate)
    contraction = 3 - last if kernel == "down_backward" else last
    transposed = matrix.stride(contraction) != 1
    device, rows = device_name(matrix.device), -(-num_slots // weights.num_experts)
    return Key(device, kernel, transposed, dtype_name(matrix.dtype), n, k, bucket(rows))


def gradient_key(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, num_slots: int, *, gathers_left: bool
) -> Key:
    """The key of a gradient of weights.

    Args:
        shape: (E, M, N) of the gradient as it is computed.
        dtype: of the operands.
        device: where they are.
        num_slots: S.
        gathers_left: whether the rows of the gradient are those of tokens.
    """
    experts, n, k = shape
    rows = bucket(-(-num_slots // experts))
    return Key(device_name(device), "weight_gradient", gathers_left, dtype_name(dtype), n, k, rows)


@functools.lru_cache(maxsize=4096)
def lookup(key: Key) -> Config | None:
    """The config of the nearest key in both tables, or `None`; of equal keys the user's counts.

    Near means: the same device, kernel, layout and data type, each size at most twice or half as large, and rows at
    most one power of two away.
    """
    entries = [*_user_table(), *_shipped_table()]
    near = [(distance, number) for number, entry in enumerate(entries) if (distance := _distance(key, entry.key))]
    return entries[min(near)[1]].config if near else None


def _distance(key: Key, other: Key) -> tuple[float, int] | None:
    """How far two keys are from each other; `None` where one tells nothing about the other."""
    same = ("device", "kernel", "transposed", "dtype")
    if any(getattr(key, name) != getattr(other, name) for name in same):
        return None
    n, k, rows = (abs(math.log2(getattr(key, name) / getattr(other, name))) for name in ("n", "k", "rows"))
    # Of two as far, the one with fewer rows: a tile that is too small costs less than one that stays half empty.
    return (n + k + rows, other.rows) if max(n, k, rows) <= 1 else None


# Tables -------------------------------------------------------------------------------------------------------------


def user_table_path() -> Path:
    """Where the user's table is: below the home of Hugging Face's caches, `$HF_HOME` or `~/.cache/huggingface`."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hf_moe_ext" / "tuned_kernels.json"


@functools.lru_cache(maxsize=1)
def _user_table() -> list[Entry]:
    path = user_table_path()
    return read_table(path) if path.exists() else []


@functools.lru_cache(maxsize=1)
def _shipped_table() -> list[Entry]:
    return read_table(SHIPPED)


def forget_tables() -> None:
    """Read the tables anew at the next look-up."""
    for cached in (lookup, _user_table, _shipped_table):
        cached.cache_clear()


def read_table(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        ValueError: it is not a table, a damaged one, or one of a newer version; the message names it.
        OSError: it cannot be read.
    """
    cure = f"Remove it, or write it anew with `hf-moe kernels tune`. ({path})"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the table of kernel sizes is not valid JSON: {error}. {cure}") from None
    version = data.get("format") if isinstance(data, dict) else None
    if type(version) is int and version > FORMAT:
        raise ValueError(
            f"the table of kernel sizes has format {version}, this version of hf-moe-ext reads up to {FORMAT}. "
            f"Update hf-moe-ext. {cure}"
        )
    if version != FORMAT or not isinstance(data.get("entries"), list):
        raise ValueError(f"the table of kernel sizes has no `format` or no `entries`. {cure}")
    entries = []
    for number, item in enumerate(data["entries"]):
        try:
            entries.append(_entry(item))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"entry {number} of the table of kernel sizes is damaged: {error}. {cure}") from None
    return entries


def _entry(item: dict[str, Any]) -> Entry:
    unknown = item.keys() - {"config", "microseconds", "default_microseconds"} - {f.name for f in fields(Key)}
    if unknown:
        raise ValueError(f"unknown {sorted(unknown)}")
    key = Key(**{field.name: item[field.name] for field in fields(Key)})
    cls = _config_class(key)
    values = item["config"]
    for field in fields(cls):
        if field.name in values and type(values[field.name]) is not type(field.default):
            raise ValueError(f"`{field.name}` must be of type {type(field.default).__name__}")
        if type(field.default) is int and values.get(field.name, 1) < 1:
            raise ValueError(f"`{field.name}` must be positive")
    if "precision" in values:
        raise ValueError("`precision` is chosen by PyTorch, not by a table")
    if key.kernel != "decode":
        values = {**values, "precision": "tf32" if key.dtype == "tf32" else "ieee"}
    times = [item[name] for name in ("microseconds", "default_microseconds")]
    if not all(isinstance(time, (int, float)) and 0 < time < math.inf for time in times):
        raise ValueError(f"times must be positive numbers, got {times}")
    return Entry(key, cls(**values), *times)


def _config_class(key: Key) -> type[Config]:
    return DecodeConfig if key.kernel == "decode" else KernelConfig


def write_table(path: Path, entries: Iterable[Entry]) -> None:
    """Write a table, whole or not at all. Of several entries with one key the last one stays."""
    unique = {entry.key: entry for entry in entries}
    ordered = sorted(unique.values(), key=lambda entry: tuple(map(str, asdict(entry.key).values())))
    lines = ",\n".join("  " + json.dumps(_item(entry)) for entry in ordered)
    text = (
        f'{{"format": {FORMAT}, "entries": [\n{lines}\n]}}\n' if lines else f'{{"format": {FORMAT}, "entries": []}}\n'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{token_hex(4)}.partial")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def _item(entry: Entry) -> dict[str, Any]:
    config = {name: value for name, value in asdict(entry.config).items() if name != "precision"}
    times = {name: round(getattr(entry, name), 3) for name in ("microseconds", "default_microseconds")}
    return {**asdict(entry.key), "config": config, **times}


def add_to_user_table(entries: Iterable[Entry]) -> Path:
    """Add entries to the user's table, where they replace those of the same keys. Returns its path.

    Raises:
        ValueError: the file that is there cannot be read.
    """
    path = user_table_path()
    write_table(path, [*(read_table(path) if path.exists() else []), *entries])
    forget_tables()
    return path
