"""The header of a safetensors file: which tensors it holds, checked against the file's size."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard

from experts.errors import ConfigError

# The format's own limit; a length beyond it is not a header but noise.
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is and what it is."""

    file: Path
    dtype: str  # as in the header: BF16, F16, F32, F8_E4M3, ...
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One file's table of contents."""

    tensors: Mapping[str, TensorEntry]
    raw: bytes  # the header as it stands in the file
    file_bytes: int  # size of the whole file


def read_header(file: Path) -> Header:
    """Reads the header of one safetensors file, and nothing of its data.

    Raises ConfigError for a file that is cut off, or whose header does not describe it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER_BYTES + 1
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise _broken(file, "its header is longer than the file or the format allow")
        raw = stream.read(length)
    try:
        table = json.loads(raw)
    except ValueError:
        raise _broken(file, "its header is not JSON") from None
    if not isinstance(table, dict):
        raise _broken(file, "its header is not a JSON object")
    data_bytes = size - 8 - length
    tensors = {name: _entry(file, name, e, data_bytes) for name, e in table.items() if name != "__metadata__"}
    return Header(tensors=tensors, raw=raw, file_bytes=size)


def _entry(file: Path, name: str, entry: object, data_bytes: int) -> TensorEntry:
    if not isinstance(entry, dict):
        raise _broken(file, f"its entry for {name} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise _broken(file, f"its entry for {name} lacks dtype, shape or data_offsets")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise _broken(file, f"{name} would end at byte {end} of {data_bytes}: the file is cut off")
    if dtype in _ITEM_BYTES and end - begin != prod(shape) * _ITEM_BYTES[dtype]:
        raise _broken(file, f"{name} has {end - begin} bytes, which is not {dtype} of shape {shape}")
    return TensorEntry(file, dtype, tuple(shape))


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _broken(file: Path, why: str) -> ConfigError:
    return ConfigError(f"{file} is not a whole safetensors file: {why}; download or save it again")
