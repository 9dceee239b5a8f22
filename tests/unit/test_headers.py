"""The header of a safetensors file: read without its data, and refused when the file is not what it says."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experts.errors import ConfigError
from experts.headers import read_header


def test_a_header_lists_names_dtypes_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2, 3, dtype=torch.bfloat16), "y": torch.zeros(0)}, file, metadata={"format": "pt"})
    header = read_header(file)
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        "x": ("BF16", (2, 3)),
        "y": ("F32", (0,)),
    }
    assert header.file_bytes == file.stat().st_size == 8 + len(header.raw) + 12


def _header(table: object, data: bytes = b"") -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        _header(b"not json"),
        _header([1, 2]),
        _header({"x": 3}),
        _header({"x": {"dtype": "F32", "shape": [2]}}),
        _header({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
        _header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
        _header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(8)),
        _header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a whole safetensors file"):
        read_header(file)
