"""Frames: what is encoded is decoded, and no bytes that anybody may send raise anything but FrameError."""

import pickle
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import FrameError
from experts.wire import HEADER_BYTES, MAX_TEXT_BYTES, DType, FrameReader, Header, Kind, Limits, decode, encode
from experts.wire import payload_bytes as payload_bytes_of

CHECKED = settings(deadline=None, derandomize=True, max_examples=100)
STREAMS = settings(CHECKED, max_examples=40)
LIMITS = Limits(max_rows=6, hidden_size=4, num_experts=5, top_k=3)

u16, u32, u64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    kind = draw(st.sampled_from(Kind))
    num_rows = 0 if kind in (Kind.NACK, Kind.FAILURE) else draw(st.integers(1, LIMITS.max_rows))
    extra = {
        Kind.QUESTION: st.just(LIMITS.num_experts),
        Kind.ANSWER: st.integers(0, max(num_rows - 1, 0) * LIMITS.top_k),
        Kind.ROWS: st.integers(num_rows, num_rows * LIMITS.top_k),
        Kind.FAILURE: st.integers(0, MAX_TEXT_BYTES),
    }
    return Header(
        kind,
        dtype=DType.FLOAT32 if kind is Kind.PARTIAL else draw(st.sampled_from(DType)),
        logits_dtype=draw(st.sampled_from(DType)),
        layer=draw(u16),
        num_rows=num_rows,
        num_extra=draw(extra.get(kind, st.just(0))),
        budget_ms=draw(u32),
        scale=draw(st.floats(width=32, allow_nan=False)),
        seq=draw(u64),
        placement_version=draw(u64),
        incarnation=draw(u64),
        truncate=kind is Kind.QUESTION and draw(st.booleans()),
    )


@st.composite
def frames(draw: st.DrawFn) -> tuple[Header, bytes]:
    header = draw(headers())
    fill = draw(st.integers(0, 255))
    return header, bytes((fill + i) % 256 for i in range(payload_bytes_of(header, LIMITS)))


def raises_only_frame_error(data: bytes) -> tuple[Header, int] | None:
    try:
        return decode(data, LIMITS)
    except FrameError:
        return None


@CHECKED
@given(header=headers())
def test_decode_inverts_encode(header: Header) -> None:
    found, length = decode(encode(header, LIMITS), LIMITS)
    assert found == header
    assert all(type(a) is type(b) for a, b in zip(found, header, strict=True))
    assert length == payload_bytes_of(header, LIMITS) <= LIMITS.max_payload_bytes


@CHECKED
@given(data=st.binary(max_size=3 * HEADER_BYTES))
def test_arbitrary_bytes_are_refused_with_frame_error(data: bytes) -> None:
    assert raises_only_frame_error(data) is None


@CHECKED
@given(header=headers(), flips=st.lists(st.integers(0, HEADER_BYTES * 8 - 1), min_size=1, max_size=4))
def test_flipped_bits_give_frame_error_or_another_header_within_the_limits(header: Header, flips: list[int]) -> None:
    data = bytearray(encode(header, LIMITS))
    for bit in flips:
        data[bit // 8] ^= 1 << bit % 8
    found = raises_only_frame_error(bytes(data))
    if found is not None:
        assert found[1] == payload_bytes_of(found[0], LIMITS) <= LIMITS.max_payload_bytes


@CHECKED
@given(header=headers(), length=st.integers(0, HEADER_BYTES - 1))
def test_a_truncated_header_is_refused(header: Header, length: int) -> None:
    with pytest.raises(FrameError):
        decode(encode(header, LIMITS)[:length], LIMITS)


@CHECKED
@given(kind=st.sampled_from(Kind), num_rows=u32, num_extra=u32, length=u32)
def test_no_combination_of_sizes_reaches_beyond_the_limits(
    kind: Kind, num_rows: int, num_extra: int, length: int
) -> None:
    good = Header(kind, num_rows=0 if kind in (Kind.NACK, Kind.FAILURE) else 1, num_extra=_least_extra(kind))
    data = bytearray(encode(good, LIMITS))
    struct.pack_into("<II", data, 12, num_rows, num_extra)
    struct.pack_into("<I", data, 24, length)  # behind budget_ms
    found = raises_only_frame_error(bytes(data))
    assert found is None or found[1] == length <= LIMITS.max_payload_bytes


def _least_extra(kind: Kind) -> int:
    return {Kind.QUESTION: LIMITS.num_experts, Kind.ROWS: 1}.get(kind, 0)


@STREAMS
@given(sent=st.lists(frames(), min_size=1, max_size=5), data=st.data())
def test_frames_arrive_the_same_however_the_stream_is_cut(
    sent: list[tuple[Header, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(encode(header, LIMITS) + payload for header, payload in sent)
    reader = FrameReader(LIMITS)
    size = len(reader.writable())
    found: list[tuple[Header, bytes]] = []
    position = 0
    while position < len(stream):
        room = reader.writable()
        assert 0 < len(room) <= size
        step = min(data.draw(st.one_of(st.integers(1, 5), st.integers(1, 3000))), len(room), len(stream) - position)
        room[:step] = stream[position : position + step]
        reader.wrote(step)
        position += step
        while (frame := reader.next_frame()) is not None:
            found.append((frame[0], bytes(frame[1])))
    assert found == sent
    assert len(reader.writable()) == size


@STREAMS
@given(value=st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_a_pickle_is_never_anything_but_bytes(value: object) -> None:
    pickled = pickle.dumps(value)[:MAX_TEXT_BYTES]
    assert raises_only_frame_error(pickled + bytes(HEADER_BYTES)) is None
    reader = FrameReader(LIMITS)
    data = encode(Header(Kind.FAILURE, num_extra=len(pickled)), LIMITS) + pickled
    reader.writable()[: len(data)] = data
    reader.wrote(len(data))
    frame = reader.next_frame()
    assert frame is not None and bytes(frame[1]) == pickled
