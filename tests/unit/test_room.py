"""Memory that is used again: what is given before `clear` is apart, and afterwards it is the same."""

import numpy as np

from experts.room import Room


def test_what_is_given_until_clear_is_apart_and_of_the_shape_that_was_asked_for() -> None:
    room = Room()
    for _ in range(2):  # the first time there is no room yet
        room.clear()
        x, bits, y = room.take((3, 5), np.float32), room.take((7,), np.uint16), room.take((2, 1), np.dtype(np.int64))
        assert (x.shape, bits.shape, y.shape) == ((3, 5), (7,), (2, 1))
        assert (x.dtype, bits.dtype, y.dtype) == (np.float32, np.uint16, np.int64)
        x[...], bits[...], y[...] = 1.5, 2, 3
        assert (x == 1.5).all() and (bits == 2).all() and (y == 3).all()


def test_the_same_memory_is_given_again_as_soon_as_there_was_as_much() -> None:
    room = Room()
    room.take((4, 4), np.float32)
    room.clear()
    before = room.take((4, 4), np.float32)
    room.clear()
    assert np.shares_memory(before, room.take((16,), np.float32))


def test_arrays_begin_with_cache_lines_and_more_than_there_is_room_for_is_given_all_the_same() -> None:
    room = Room()
    for size in (1, 100, 1000):
        room.clear()
        small, large = room.take((1,), np.uint8), room.take((size,), np.float64)
        large[...] = size
        small[...] = 0
        assert (large == size).all()
    room.clear()
    first, second = room.take((3,), np.uint8), room.take((3,), np.uint8)
    assert second.ctypes.data - first.ctypes.data == 64
