"""XXH64 against the xxhash package."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples

PATTERN = bytes((i * 151 + (i >> 8) * 7 + 43) & 255 for i in range(1000))


def test_every_length_up_to_200(kernels: Kernels) -> None:
    for size in range(201):
        for start in (0, 1, 3):
            data = PATTERN[start : start + size]
            assert kernels.hash.xxh64(data) == xxhash.xxh64_intdigest(data), size


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_equal_bytes(kernels: Kernels, byte: int) -> None:
    for size in (0, 1, 4, 8, 31, 32, 33, 63, 64, 96, 200):
        assert kernels.hash.xxh64(bytes([byte]) * size) == xxhash.xxh64_intdigest(bytes([byte]) * size)


@examples(150)
@given(data=st.binary(max_size=300))
def test_any_bytes(kernels: Kernels, data: bytes) -> None:
    assert kernels.hash.xxh64(data) == xxhash.xxh64_intdigest(data)
    assert kernels.hash.xxh64(memoryview(data)) == kernels.hash.xxh64(bytearray(data)) == kernels.hash.xxh64(data)


@examples(100)
@given(texts=st.lists(st.text(max_size=40)), gap=st.integers(0, 3))
def test_columns(kernels: Kernels, texts: list[str], gap: int) -> None:
    encoded = [text.encode() for text in texts]
    sizes = np.array([len(one) for one in encoded], np.int32)
    starts = np.cumsum(sizes + gap, dtype=np.int64) - sizes
    data = b"".join(b"-" * gap + one for one in encoded)
    for buffer in (data, np.frombuffer(data, np.uint8)):
        hashes = kernels.hash.hash_strings(buffer, starts, sizes)
        assert hashes.dtype == np.uint64
        assert hashes.tolist() == [xxhash.xxh64_intdigest(one) for one in encoded]
