"""Reading and writing sharded safetensors one tensor at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of a checkpoint folder. All headers are checked at once; data is read when asked for.

    Args:
        folder (`Path`):
            Holds `model.safetensors`, or shards and their index.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        for path in _shard_paths(folder):
            try:
                with safe_open(path, framework="pt") as shard:
                    for name in shard.keys():
                        part = shard.get_slice(name)
                        self.infos[name] = TensorInfo(_DTYPES[part.get_dtype()], tuple(part.get_shape()))
                        self._files[name] = path
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"cannot read {path}: {error}. The file is damaged or cut off; get it anew."
                ) from error
            except KeyError as error:
                raise ValueError(f"{path} holds a tensor of the unsupported type {error}.") from None

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating-point type that most of the data has."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.infos.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    def read(self, name: str) -> torch.Tensor:
        """One tensor. The file is opened for it alone, so that its pages leave memory with the tensor."""
        with safe_open(self._files[name], framework="pt") as shard:
            return shard.get_tensor(name)


def _shard_paths(folder: Path) -> list[Path]:
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot read {index}: {error!r}. The file is damaged; get it anew.") from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which its index names; get them anew.")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    other = next(
        (path.name for pattern in ("*.bin", "*.safetensors", "*.gguf") for path in folder.glob(pattern)), None
    )
    raise FileNotFoundError(
        f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}"
        + (f" (but {other})" if other else "")
        + ". Load the model, save it with `save_pretrained`, and convert that folder; or use `upcycle`."
    )


def parse_size(size: int | str) -> int:
    """`"5GB"` -> 5000000000.

    Raises:
        ValueError: for anything that is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(size).upper())
    value = 0 if match is None else int(float(match[1]) * _UNITS[match[2].removesuffix("B")])
    if value < 1:
        raise ValueError(f'`max_shard_size` must be a positive size such as "5GB" or "500MB", got {size!r}.')
    return value


class SafetensorsWriter:
    """Writes tensors of known shapes, in any order, into one file or into shards with an index.

    Headers are written first and every tensor goes to its place at once, so nothing is kept in memory.

    Args:
        folder (`Path`):
            An existing folder.
        infos (`dict[str, TensorInfo]`):
            All tensors, in the order they shall have in the files.
        max_shard_size (`int`):
            In bytes. A larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, infos: dict[str, TensorInfo], max_shard_size: int) -> None:
        self._infos = infos
        self._places: dict[str, tuple[Path, int]] = {}
        shards: list[list[str]] = [[]]
        size = 0
        for name, info in infos.items():
            if shards[-1] and size + info.num_bytes > max_shard_size:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += info.num_bytes
        paths = [folder / SINGLE_NAME]
        if len(shards) > 1:
            paths = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            total = sum(info.num_bytes for info in infos.values())
            weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        for path, names in zip(paths, shards, strict=True):
            self._begin(path, names)
        self._missing = set(infos)

    def _begin(self, path: Path, names: Iterable[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        offsets = {}
        for name in names:
            info = self._infos[name]
            offsets[name] = offset
            header[name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.num_bytes],
            }
            offset += info.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        self._places |= {name: (path, 8 + len(text) + start) for name, start in offsets.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor into its place.

        Raises:
            ValueError: where shape or type is not what was announced.
        """
        info, found = self._infos[name], TensorInfo(tensor.dtype, tuple(tensor.shape))
        if found != info:
            raise ValueError(f"`{name}` should be {info}, but is {found}.")
        path, start = self._places[name]
        with open(path, "r+b", buffering=0) as file:
            file.seek(start)
            data = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            while data.nbytes:
                data = data[file.write(data) :]
        self._missing.discard(name)

    def close(self) -> None:
        """Check that nothing was left out.

        Raises:
            RuntimeError: naming what was never written.
        """
        if self._missing:
            raise RuntimeError(f"never written: {', '.join(sorted(self._missing)[:5])}.")
