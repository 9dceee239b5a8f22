"""The frames of the data plane: a fixed binary header and raw tensor bytes, checked before anything is believed.

A frame is 64 bytes of header (little-endian) and a payload whose length follows from the header alone.
Nothing that runs code is ever read from a socket, and a frame can not make its reader allocate: readers
own one buffer, sized once from `Limits`.

| kind     | from -> to          | payload                                                              |
| -------- | ------------------- | -------------------------------------------------------------------- |
| QUESTION | attention -> router | x [num_rows, hidden], logits [num_rows, num_extra]                   |
| ANSWER   | router -> attention | y [num_rows, hidden], without num_extra dropped rows                 |
| ROWS     | router -> experts   | x [num_rows, hidden]; row, expert int32 [num_extra], weight float32  |
| PARTIAL  | experts -> router   | partial sums [num_rows, hidden], float32                             |
| NACK     | experts -> router   | none: the replica does not hold an expert it was asked for           |
| FAILURE  | router -> attention | UTF-8 text, num_extra bytes: why the question can not be answered    |
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Self

from experts.errors import FrameError
from experts.shape import MoEShape

MAGIC = 0x4D505845  # b"EXPM", read as a little-endian integer
VERSION = 1
HEADER_BYTES = 64
MAX_TEXT_BYTES = 2048
PAIR_BYTES = 12  # row int32, expert int32, weight float32

_HEADER = struct.Struct("<IBBBBHHIIIIfQQQQ")
assert _HEADER.size == HEADER_BYTES


class Kind(IntEnum):
    QUESTION = 1
    ANSWER = 2
    ROWS = 3
    PARTIAL = 4
    NACK = 5
    FAILURE = 6


class DType(IntEnum):
    """Element types on the wire."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2

    @property
    def itemsize(self) -> int:
        return 4 if self is DType.FLOAT32 else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a link may carry at most; both ends derive it from the same checkpoint and config."""

    max_rows: int  # tokens of one step
    hidden_size: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, shape: MoEShape, *, max_rows: int) -> Self:
        return cls(max_rows=max_rows, hidden_size=shape.hidden_size, num_experts=shape.num_experts, top_k=shape.top_k)

    @property
    def max_payload_bytes(self) -> int:
        x_bytes = self.max_rows * self.hidden_size * 4
        return x_bytes + self.max_rows * max(self.num_experts * 4, self.top_k * PAIR_BYTES) + MAX_TEXT_BYTES


class Header(NamedTuple):
    """The header of one frame; a tuple because one is made for every message of the hot path."""

    kind: Kind
    dtype: DType = DType.FLOAT32  # of x, y or the partial sums
    logits_dtype: DType = DType.FLOAT32
    layer: int = 0  # index in the model
    num_rows: int = 0
    num_extra: int = 0  # QUESTION: num_experts; ANSWER: dropped rows; ROWS: pairs (row, expert); FAILURE: bytes of text
    budget_ms: int = 0  # QUESTION: how long the asker will wait
    scale: float = 1.0  # QUESTION: factor on the routing weights
    seq: int = 0  # an answer carries its question's
    placement_version: int = 0
    incarnation: int = 0  # of the replica that is meant, and that answers
    truncate: bool = False  # QUESTION: the asker's vLLM cuts off the low bits of its sums, and so must the answer


def encode(header: Header, limits: Limits) -> bytes:
    """The 64 bytes of a header; the caller sends the payload behind it."""
    return _HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.dtype,
        header.logits_dtype,
        header.layer,
        header.truncate,
        header.num_rows,
        header.num_extra,
        header.budget_ms,
        payload_bytes(header, limits),
        header.scale,
        header.seq,
        header.placement_version,
        header.incarnation,
        0,
    )


def decode(buffer: bytes | bytearray | memoryview, limits: Limits, offset: int = 0) -> tuple[Header, int]:
    """A header and the length of its payload in bytes.

    buffer: HEADER_BYTES from `offset`.
    Raises FrameError for anything but a well-formed header within `limits`.
    """
    if len(buffer) - offset < HEADER_BYTES:
        raise FrameError(f"{len(buffer) - offset} bytes are not a header")
    (
        magic,
        version,
        kind,
        dtype,
        logits_dtype,
        layer,
        truncate,
        num_rows,
        num_extra,
        budget_ms,
        length,
        scale,
        seq,
        placement_version,
        incarnation,
        reserved_tail,
    ) = _HEADER.unpack_from(buffer, offset)
    if magic != MAGIC or version != VERSION:
        raise FrameError(f"not a frame of protocol version {VERSION}: magic {magic:#010x}, version {version}")
    if reserved_tail or truncate > (kind == Kind.QUESTION):
        raise FrameError("reserved header bytes are not zero")
    try:
        known_kind, known_dtype, known_logits_dtype = _KINDS[kind], _DTYPES[dtype], _DTYPES[logits_dtype]
    except KeyError:
        raise FrameError(f"unknown frame kind {kind} or dtype {dtype}, {logits_dtype}") from None
    header = Header(
        known_kind,
        known_dtype,
        known_logits_dtype,
        layer,
        num_rows,
        num_extra,
        budget_ms,
        scale,
        seq,
        placement_version,
        incarnation,
        bool(truncate),
    )
    if length != payload_bytes(header, limits):
        raise FrameError(f"{known_kind.name} frame of {num_rows} rows declares {length} bytes of payload")
    return header, length


def payload_bytes(header: Header, limits: Limits) -> int:
    """How many bytes must follow `header`. Raises FrameError where a dimension exceeds `limits`."""
    kind, num_rows, num_extra = header.kind, header.num_rows, header.num_extra
    if num_rows > limits.max_rows:
        raise FrameError(f"{kind.name} frame has {num_rows} rows, and the limit is {limits.max_rows}")
    if kind is Kind.FAILURE:
        if num_rows or num_extra > MAX_TEXT_BYTES:
            raise FrameError(f"FAILURE frame has {num_rows} rows and {num_extra} bytes of text")
        return num_extra
    if kind is Kind.NACK:
        if num_rows or num_extra:
            raise FrameError("NACK frame with a payload")
        return 0
    if num_rows == 0:
        raise FrameError(f"{kind.name} frame without rows")
    x_bytes = num_rows * limits.hidden_size * header.dtype.itemsize
    if kind is Kind.QUESTION:
        if num_extra != limits.num_experts:
            raise FrameError(f"QUESTION frame has {num_extra} logits a row, and the model {limits.num_experts} experts")
        return x_bytes + num_rows * num_extra * header.logits_dtype.itemsize
    if kind is Kind.ROWS:
        if not num_rows <= num_extra <= num_rows * limits.top_k:
            raise FrameError(f"ROWS frame has {num_extra} pairs for {num_rows} rows, top_k is {limits.top_k}")
        return x_bytes + num_extra * PAIR_BYTES
    if kind is Kind.ANSWER:
        # A token is a row of at most top_k groups, and a group that has rows (at most num_rows) keeps one of them.
        if num_extra > (num_rows - 1) * limits.top_k:
            raise FrameError(f"ANSWER frame has {num_extra} dropped rows for {num_rows}, top_k is {limits.top_k}")
        return x_bytes
    if num_extra:
        raise FrameError(f"PARTIAL frame with num_extra {num_extra}")
    if header.dtype is not DType.FLOAT32:
        raise FrameError("PARTIAL frame that is not float32")
    return x_bytes


_KINDS = {int(kind): kind for kind in Kind}
_DTYPES = {int(dtype): dtype for dtype in DType}


class FrameReader:
    """Cuts a byte stream into frames, in one buffer that never grows.

    Give the socket `writable()`, tell `wrote(n)`, then drain `next_frame()` until it is None.
    A payload is a view that stays valid until the next `writable()`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = memoryview(bytearray(HEADER_BYTES + limits.max_payload_bytes))
        self._begin = 0  # of bytes not yet cut
        self._end = 0

    def writable(self) -> memoryview:
        """Room for the next bytes, never empty: what is left over moves to the front first."""
        if self._begin:
            left = self._end - self._begin
            if left:
                self._buffer[:left] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, left
        return self._buffer[self._end :]

    def wrote(self, num_bytes: int) -> None:
        self._end += num_bytes

    def next_frame(self) -> tuple[Header, memoryview] | None:
        """The next whole frame, or None. Raises FrameError; the stream is useless then."""
        start = self._begin + HEADER_BYTES
        if start > self._end:
            return None
        header, length = decode(self._buffer, self._limits, self._begin)
        if start + length > self._end:
            return None
        self._begin = start + length
        return header, self._buffer[start : start + length]
