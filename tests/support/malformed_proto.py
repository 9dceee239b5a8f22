"""Wrong and extreme bytes for every field of any protobuf message, made from its descriptor.

They are written on the wire by hand, since Python's own messages refuse to hold half of them.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

MAX_DEPTH = 3  # messages inside messages that are filled, too
_MANY = 10_000
_LONG = 1 << 16
_VARINT, _FIXED64, _LENGTH, _GROUP, _END_GROUP, _FIXED32 = range(6)
_ENDLESS = b"\xff" * 10 + b"\x01"  # eleven bytes: no varint has more than ten

Type = FieldDescriptor
_WIRE_TYPES = {
    Type.TYPE_DOUBLE: _FIXED64,
    Type.TYPE_FIXED64: _FIXED64,
    Type.TYPE_SFIXED64: _FIXED64,
    Type.TYPE_FLOAT: _FIXED32,
    Type.TYPE_FIXED32: _FIXED32,
    Type.TYPE_SFIXED32: _FIXED32,
    Type.TYPE_STRING: _LENGTH,
    Type.TYPE_BYTES: _LENGTH,
    Type.TYPE_MESSAGE: _LENGTH,
}
_FRACTIONS = (("minus one", -1.0), ("minus zero", -0.0), ("the largest", 3e38), ("the smallest", -3e38))
_NO_FRACTIONS = (("NaN", float("nan")), ("infinity", float("inf")), ("minus infinity", -float("inf")))
_WHOLE = (
    ("minus one", 2**64 - 1),
    ("2^31 - 1", 2**31 - 1),
    ("2^31", 2**31),
    ("2^32 - 1", 2**32 - 1),
    ("2^63 - 1", 2**63 - 1),
    ("-2^31", 2**64 - 2**31),
    ("-2^63", 2**63),
)
_BAD_TEXTS = (("no UTF-8", b"\xff\xfe"), ("half a surrogate pair", b"\xed\xa0\x80"), ("an overlong slash", b"\xc0\xaf"))
_TEXTS = (
    ("empty", b""),
    ("NUL", b"\0"),
    ("a line break", b"a\nb"),
    ("long", b"x" * _LONG),
    ("a path", b"../../a"),
    ("braces", b"{" * 100),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extreme:
    """One field with one value, to be appended to a message that is in order: the last value of a field counts."""

    name: str
    wire: bytes
    is_wrong: bool  # whatever the field means; otherwise the receiver may find it good


def extremes(message: Descriptor, depth: int = MAX_DEPTH) -> Iterator[Extreme]:
    """Of every field, and of the fields of its messages down to `depth`."""
    for field in message.fields:
        wire_type = _WIRE_TYPES.get(field.type, _VARINT)
        tag = varint(field.number << 3 | wire_type)
        yield Extreme(name=f"{field.name} has no value", wire=tag, is_wrong=True)
        yield Extreme(name=f"{field.name} is of another wire type", wire=_other_type(field, wire_type), is_wrong=False)
        if wire_type == _LENGTH:
            yield Extreme(
                name=f"{field.name} is longer than the message", wire=tag + varint(1000) + b"x", is_wrong=True
            )
            yield Extreme(name=f"{field.name} is 2^63 bytes long", wire=tag + varint(2**63) + b"x", is_wrong=True)
            yield from _texts(field, tag, depth)
        elif wire_type == _VARINT:
            yield Extreme(name=f"{field.name} is a varint of 11 bytes", wire=tag + _ENDLESS, is_wrong=True)
            for what, whole in _WHOLE:
                yield Extreme(name=f"{field.name} is {what}", wire=tag + varint(whole), is_wrong=False)
        else:
            yield from _fixed(field, tag)
        if field.is_repeated:
            yield Extreme(name=f"{field.name} is there {_MANY} times", wire=_many(wire_type, tag), is_wrong=False)


def varint(value: int) -> bytes:
    """value: not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, payload: bytes) -> bytes:
    """A field with a length: a string, bytes or a message."""
    return varint(number << 3 | _LENGTH) + varint(len(payload)) + payload


def broken_messages(whole: bytes) -> Iterator[Extreme]:
    """What no message type can make sense of, and what any must bear. whole: a message that is in order."""
    for what, wire in _BROKEN.items():
        yield Extreme(name=what, wire=wire, is_wrong=True)
        yield Extreme(name=f"{what}, behind a good message", wire=whole + wire, is_wrong=True)
    for what, wire in _UNKNOWN.items():
        yield Extreme(name=f"{what}, behind a good message", wire=whole + wire, is_wrong=False)
    for end in range(len(whole)):
        yield Extreme(name=f"a message that ends behind {end} bytes", wire=whole[:end], is_wrong=False)


_FAR = 2**29 - 1  # the largest field number
_BROKEN = {
    "a tag cut short": b"\xff",
    "a field number that is too large": varint(2**32 << 3) + b"\x00",
    "wire type 6": varint(_FAR << 3 | 6) + b"\x00",
    "wire type 7": varint(_FAR << 3 | 7) + b"\x00",
    "a group without an end": varint(_FAR << 3 | _GROUP),
    "the end of no group": varint(_FAR << 3 | _END_GROUP),
    "the end of another group": varint(_FAR << 3 | _GROUP) + varint(_FAR - 1 << 3 | _END_GROUP),
    "groups 200 deep": varint(_FAR << 3 | _GROUP) * 200 + varint(_FAR << 3 | _END_GROUP) * 200,
    "groups 100 000 deep": varint(_FAR << 3 | _GROUP) * 100_000,
    "an unknown field of 2^31 bytes": varint(_FAR << 3 | _LENGTH) + varint(2**31),
    "a megabyte of 0xff": b"\xff" * (1 << 20),
    "JSON": b'{"prompt": "hi", "max_tokens": 2}',
    "a pickle": b"\x80\x04\x8c\x08builtins\x8c\x05print\x93\x8c\x02hi\x85R.",
}
_UNKNOWN = {
    "field number 0": b"\x00\x00",
    "NULs": b"\0" * 1000,
    "an unknown field": field(_FAR, b"hi"),
    "100 000 unknown fields": (varint(_FAR << 3) + b"\x01") * 100_000,
    "an unknown megabyte": field(_FAR, b"x" * (1 << 20)),
    "an unknown group": varint(_FAR << 3 | _GROUP) + varint(_FAR << 3 | _END_GROUP),
}


def _texts(of: FieldDescriptor, tag: bytes, depth: int) -> Iterator[Extreme]:
    """Strings, bytes and messages."""

    def valued(what: str, payload: bytes, *, is_wrong: bool) -> Extreme:
        return Extreme(name=f"{of.name} is {what}", wire=tag + varint(len(payload)) + payload, is_wrong=is_wrong)

    if of.message_type is not None:
        yield valued("empty", b"", is_wrong=False)
        yield valued("no message", b"\xff", is_wrong=True)
        for inner in extremes(of.message_type, depth - 1) if depth > 1 else ():
            wire = tag + varint(len(inner.wire)) + inner.wire
            yield Extreme(name=f"{of.name}.{inner.name}", wire=wire, is_wrong=inner.is_wrong)
        return
    for what, text in _TEXTS:
        yield valued(what, text, is_wrong=False)
    for what, text in _BAD_TEXTS:
        yield valued(what, text, is_wrong=of.type == Type.TYPE_STRING)


def _fixed(of: FieldDescriptor, tag: bytes) -> Iterator[Extreme]:
    """Numbers of 4 or 8 bytes."""
    size = 8 if _WIRE_TYPES[of.type] == _FIXED64 else 4
    yield Extreme(name=f"{of.name} is cut short", wire=tag + bytes(size - 1), is_wrong=True)
    if of.type not in (Type.TYPE_FLOAT, Type.TYPE_DOUBLE):
        yield Extreme(name=f"{of.name} is all ones", wire=tag + b"\xff" * size, is_wrong=False)
        return
    pack: Callable[[float], bytes] = struct.Struct("<d" if size == 8 else "<f").pack
    for what, value in _FRACTIONS:
        yield Extreme(name=f"{of.name} is {what}", wire=tag + pack(value), is_wrong=False)
    for what, value in _NO_FRACTIONS:
        yield Extreme(name=f"{of.name} is {what}", wire=tag + pack(value), is_wrong=True)


def _other_type(of: FieldDescriptor, wire_type: int) -> bytes:
    """Read as an unknown field, so that the message stays what it was; packed numbers are another spelling."""
    if wire_type == _LENGTH:
        return varint(of.number << 3 | _VARINT) + b"\x01"
    return varint(of.number << 3 | _LENGTH) + b"\x03abc"


def _many(wire_type: int, tag: bytes) -> bytes:
    values = {_VARINT: b"\x01", _FIXED32: bytes(4), _FIXED64: bytes(8), _LENGTH: b"\x00"}
    return (tag + values[wire_type]) * _MANY
