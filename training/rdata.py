"""Reads text out of R's lazy-load databases (`Rdata.rdx` and `Rdata.rdb`): named vectors of strings, no more.

The index `.rdx` is a compressed R object: a list with the offset and the length of each variable's entry in `.rdb`.
An entry is its unpacked size (4 bytes, big-endian) and the zlib data of an R object.
An R object is what R's serialize() writes in its XDR format; only data is built here, and nothing in it is run.
"""

import struct
import zlib

from experts.errors import ConfigError

RValue = str | list[int] | list[str] | dict[str, "RValue"] | None

_MAX_UNPACKED_BYTES = 64 << 20
_MAX_DEPTH = 8  # an index nests two lists

# The low byte of an item's flags word is its type.
_SYMBOL, _PAIRLIST, _CHARS, _LOGICALS, _INTEGERS, _STRINGS, _LIST, _NULL, _REFERENCE = 1, 2, 9, 10, 13, 16, 19, 254, 255
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400
_IS_LATIN1 = 0x4000


def read_text_variables(rdx: bytes, rdb: bytes) -> dict[str, list[str]]:
    """All variables of a database, each a character vector. Raises ConfigError where the bytes are anything else."""
    index = read_object(_unpack(rdx, wbits=zlib.MAX_WBITS | 16, max_bytes=_MAX_UNPACKED_BYTES))
    variables = index.get("variables") if isinstance(index, dict) else None
    if not isinstance(variables, dict):
        raise ConfigError("the index of the R database lists no variables")
    return {name: _read_strings(name, place, rdb) for name, place in variables.items()}


def read_object(data: bytes) -> RValue:
    """One serialized R object (XDR, version 2 or 3). Raises ConfigError for a type that text does not need."""
    return _Reader(data).whole()


def _read_strings(name: str, place: RValue, rdb: bytes) -> list[str]:
    """The variable whose entry starts at byte place[0] of `rdb` and is place[1] bytes long."""
    match place:
        case [int(start), int(length)] if start >= 0 and length >= 4 and start + length <= len(rdb):
            pass
        case _:
            raise ConfigError(f"the R database has no entry at {place} for {name!r}; it is {len(rdb)} bytes long")
    (size,) = struct.unpack_from(">I", rdb, start)
    unpacked = _unpack(rdb[start + 4 : start + length], wbits=zlib.MAX_WBITS, max_bytes=_MAX_UNPACKED_BYTES)
    if len(unpacked) != size:
        raise ConfigError(f"{name!r} is {len(unpacked)} bytes, and its entry announces {size}")
    value = read_object(unpacked)
    if not isinstance(value, list):
        raise ConfigError(f"{name!r} is not a vector of strings")
    return [_string(item, name) for item in value]


def _string(item: object, name: str) -> str:
    if not isinstance(item, str):
        raise ConfigError(f"{name!r} is not a vector of strings")
    return item


def _unpack(data: bytes, *, wbits: int, max_bytes: int) -> bytes:
    stream = zlib.decompressobj(wbits)
    try:
        unpacked = stream.decompress(data, max_bytes)
    except zlib.error as error:
        raise ConfigError(f"the R database is not compressed with zlib: {error}") from None
    if not stream.eof:
        raise ConfigError(f"an object of the R database is cut off, or larger than {max_bytes} bytes")
    return unpacked


class _Reader:
    """Walks over one serialized object; every length is checked against the bytes that are left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._symbols: list[str] = []  # a later item may refer to an earlier symbol by its number, from 1

    def whole(self) -> RValue:
        if self._take(2) != b"X\n":
            raise ConfigError("not an R object in the XDR format")
        version, _, _ = self._integers(3)
        if version not in (2, 3):
            raise ConfigError(f"R's serialization version is {version}, and must be 2 or 3")
        if version == 3:
            self._take(self._integer())  # the writer's native encoding; strings carry their own
        value = self._item(depth=0)
        if self._at != len(self._data):
            raise ConfigError(f"{len(self._data) - self._at} bytes follow the R object")
        return value

    def _item(self, depth: int) -> RValue:
        if depth > _MAX_DEPTH:
            raise ConfigError(f"R lists are nested deeper than {_MAX_DEPTH}")
        flags = self._integer()
        kind = flags & 0xFF
        if kind == _NULL:
            return None
        if kind == _CHARS:
            return self._chars(flags)
        if kind == _LIST:
            values = [self._item(depth + 1) for _ in range(self._integer())]
            return _named(values, self._attributes(flags, depth))
        if kind in (_LOGICALS, _INTEGERS):
            vector = self._integers(self._integer())
        elif kind == _STRINGS:
            vector = [self._chars(self._integer()) for _ in range(self._integer())]
        else:
            raise ConfigError(f"R type {kind} at byte {self._at - 4} is none that text needs")
        self._attributes(flags, depth)
        return vector

    def _attributes(self, flags: int, depth: int) -> dict[str, RValue]:
        """The pairs after an item that has attributes: (flags, tag, value) each, up to a null."""
        found: dict[str, RValue] = {}
        if not flags & _HAS_ATTRIBUTES:
            return found
        while (pair := self._integer()) & 0xFF != _NULL:
            if pair & 0xFF != _PAIRLIST or not pair & _HAS_TAG:
                raise ConfigError(f"no attribute at byte {self._at - 4} of the R object")
            tag = self._symbol()
            found[tag] = self._item(depth + 1)
        return found

    def _symbol(self) -> str:
        flags = self._integer()
        if flags & 0xFF == _SYMBOL:
            self._symbols.append(self._chars(self._integer()))
            return self._symbols[-1]
        number = (flags >> 8) or self._integer()
        if flags & 0xFF != _REFERENCE or not 1 <= number <= len(self._symbols):
            raise ConfigError(f"no symbol at byte {self._at - 4} of the R object")
        return self._symbols[number - 1]

    def _chars(self, flags: int) -> str:
        if flags & 0xFF != _CHARS:
            raise ConfigError(f"no string at byte {self._at - 4} of the R object")
        raw = self._take(self._integer())
        try:
            return raw.decode("latin-1" if flags & _IS_LATIN1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"a string of the R object is not UTF-8: {error}") from None

    def _integer(self) -> int:
        return self._integers(1)[0]

    def _integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{count}i", self._take(4 * count)))

    def _take(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= len(self._data) - self._at:
            raise ConfigError(f"{num_bytes} bytes wanted at byte {self._at} of {len(self._data)} of the R object")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]


def _named(values: list[RValue], attributes: dict[str, RValue]) -> dict[str, RValue]:
    names = attributes.get("names")
    if not isinstance(names, list) or len(names) != len(values):
        raise ConfigError(f"an R list of {len(values)} values has no name for each")
    return {str(name): value for name, value in zip(names, values)}
