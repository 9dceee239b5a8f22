"""Each rule of the frame format by itself."""

import struct
from dataclasses import replace

import pytest

from experts.errors import FrameError
from experts.shape import MoEShape
from experts.wire import HEADER_BYTES, MAX_TEXT_BYTES, VERSION, DType, FrameReader, Header, Kind, Limits, decode, encode

LIMITS = Limits(max_rows=8, hidden_size=16, num_experts=32, top_k=6)
QUESTION = Header(Kind.QUESTION, num_rows=3, num_extra=32, seq=7)
ROWS = Header(Kind.ROWS, num_rows=3, num_extra=5)


def patched(header: Header, offset: int, value: bytes) -> bytes:
    data = bytearray(encode(header, LIMITS))
    data[offset : offset + len(value)] = value
    return bytes(data)


def test_the_header_is_64_bytes_and_begins_with_the_magic_and_the_version() -> None:
    data = encode(QUESTION, LIMITS)
    assert len(data) == HEADER_BYTES == 64
    assert data[:5] == b"EXPM" + bytes([VERSION])


@pytest.mark.parametrize(
    ("offset", "value", "complaint"),
    [
        (0, b"GET ", "not a frame"),
        (4, bytes([VERSION + 1]), "version 2"),
        (5, b"\x00", "unknown frame kind 0"),
        (5, b"\x63", "unknown frame kind 99"),
        (6, b"\x03", "dtype 3"),
        (7, b"\xff", "0, 255"),
        (10, b"\x02", "reserved"),
        (63, b"\x01", "reserved"),
        (12, struct.pack("<I", 0), "without rows"),
        (12, struct.pack("<I", 9), "limit is 8"),
        (12, struct.pack("<I", 2**32 - 1), "limit is 8"),
        (16, struct.pack("<I", 31), "31 logits a row"),
        (16, struct.pack("<I", 2**32 - 1), "logits a row"),
        (24, struct.pack("<I", 2**32 - 1), "declares 4294967295 bytes"),
        (24, struct.pack("<I", 0), "declares 0 bytes"),
    ],
)
def test_a_malformed_question_is_refused_with_what_is_wrong(offset: int, value: bytes, complaint: str) -> None:
    with pytest.raises(FrameError, match=complaint):
        decode(patched(QUESTION, offset, value), LIMITS)


def test_dimensions_whose_product_wraps_to_the_declared_length_are_refused() -> None:
    # 2**30 rows of 16 float32 are 2**36 bytes, which is 0 in 32 bits.
    data = bytearray(encode(Header(Kind.ANSWER, num_rows=1), LIMITS))
    struct.pack_into("<I", data, 12, 2**30)
    struct.pack_into("<I", data, 24, 0)
    with pytest.raises(FrameError, match="limit is 8"):
        decode(data, LIMITS)


@pytest.mark.parametrize(
    "header",
    [
        Header(Kind.ROWS, num_rows=3, num_extra=2),  # a row without an expert
        Header(Kind.ROWS, num_rows=3, num_extra=19),  # more than top_k experts a row
        Header(Kind.ROWS, num_rows=0, num_extra=0),
        Header(Kind.ANSWER, num_rows=0),
        Header(Kind.ANSWER, num_rows=1, num_extra=1),
        Header(Kind.ANSWER, num_rows=3, num_extra=13),
        Header(Kind.PARTIAL, num_rows=1, dtype=DType.BFLOAT16),
        Header(Kind.NACK, num_rows=1),
        Header(Kind.NACK, num_extra=1),
        Header(Kind.FAILURE, num_rows=1),
        Header(Kind.FAILURE, num_extra=MAX_TEXT_BYTES + 1),
        Header(Kind.QUESTION, num_rows=9, num_extra=32),
    ],
)
def test_what_may_not_be_received_can_not_be_sent_either(header: Header) -> None:
    with pytest.raises(FrameError):
        encode(header, LIMITS)


def test_an_answer_says_how_many_rows_were_dropped_as_far_as_each_group_kept_one() -> None:
    assert decode(encode(Header(Kind.ANSWER, num_rows=3, num_extra=12), LIMITS), LIMITS)[0].num_extra == 12


def test_payload_lengths_are_those_of_the_table() -> None:
    lengths = {
        replace_kind: decode(encode(header, LIMITS), LIMITS)[1]
        for replace_kind, header in {
            "question": QUESTION._replace(dtype=DType.BFLOAT16),
            "answer": Header(Kind.ANSWER, num_rows=3),
            "rows": ROWS._replace(dtype=DType.FLOAT16),
            "partial": Header(Kind.PARTIAL, num_rows=3),
            "nack": Header(Kind.NACK),
            "failure": Header(Kind.FAILURE, num_extra=11),
        }.items()
    }
    assert lengths == {
        "question": 3 * 16 * 2 + 3 * 32 * 4,
        "answer": 3 * 16 * 4,
        "rows": 3 * 16 * 2 + 5 * 12,
        "partial": 3 * 16 * 4,
        "nack": 0,
        "failure": 11,
    }


def test_both_ends_derive_the_same_limits_from_the_shape() -> None:
    shape = MoEShape(moe_layers=(1,), hidden_size=16, moe_intermediate_size=8, num_experts=32, top_k=6)
    assert Limits.of(shape, max_rows=8) == LIMITS
    assert replace(LIMITS, max_rows=9).max_payload_bytes > LIMITS.max_payload_bytes


def test_a_reader_keeps_one_buffer_and_hands_out_views_of_it() -> None:
    reader = FrameReader(LIMITS)
    room = reader.writable()
    assert len(room) == HEADER_BYTES + LIMITS.max_payload_bytes
    data = encode(Header(Kind.FAILURE, num_extra=2), LIMITS) + b"no"
    for _ in range(1000):
        again = reader.writable()
        assert again.obj is room.obj and len(again) == len(room)
        again[: len(data)] = data
        reader.wrote(len(data))
        frame = reader.next_frame()
        assert frame is not None and frame[1] == b"no"
        assert reader.next_frame() is None


def test_a_reader_refuses_a_bad_header_before_its_payload_is_there() -> None:
    reader = FrameReader(LIMITS)
    bad = patched(QUESTION, 24, struct.pack("<I", 2**32 - 1))
    reader.writable()[:HEADER_BYTES] = bad
    reader.wrote(HEADER_BYTES)
    with pytest.raises(FrameError):
        reader.next_frame()


def test_an_offset_points_at_the_header() -> None:
    assert decode(b"abc" + encode(ROWS, LIMITS), LIMITS, 3)[0] == ROWS
    with pytest.raises(FrameError):
        decode(b"abc" + encode(ROWS, LIMITS), LIMITS, 4)
