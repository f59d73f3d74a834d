"""Reading and writing safetensors one tensor at a time."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from hf_moe_ext.upcycling.safetensors_io import SafetensorsFolder, SafetensorsWriter, TensorInfo, parse_size


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20K", 20_000), (123, 123), ("7", 7)]
)
def test_sizes_are_read(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["5 gigs", "", "0GB", -3, "GB", None])
def test_bad_sizes_are_named(size):
    with pytest.raises(ValueError, match="`max_shard_size` must be a positive size"):
        parse_size(size)


@pytest.mark.parametrize("limit", [1, 100, 10**6])
def test_every_type_and_shape_is_written_and_read_back(tmp_path, limit):
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8]
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(types)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "bool": torch.tensor([True, False])}
    tensors["strided"] = torch.arange(12.0).reshape(3, 4).t()
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(tmp_path, infos, limit)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    again = {key: tensor for path in tmp_path.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(tensor, again[name]) and tensor.dtype == again[name].dtype for name, tensor in tensors.items()
    )
    folder = SafetensorsFolder(tmp_path)
    assert folder.infos == infos and torch.equal(folder.read("strided"), tensors["strided"])


def test_a_tensor_that_was_forgotten_is_named(tmp_path):
    writer = SafetensorsWriter(tmp_path, {"a": TensorInfo(torch.float32, (2,))}, 100)
    with pytest.raises(RuntimeError, match="never written: a"):
        writer.close()
    with pytest.raises(ValueError, match="`a` should be"):
        writer.write("a", torch.zeros(3))
