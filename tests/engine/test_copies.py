"""Room for copies: what is copied, and where."""

from __future__ import annotations

from typing import Any

import numpy as np

from topk_grpc.engine.copies import Copy, Room, copied_bytes


def test_copies_of_every_kind_fit_exactly_and_stay_as_they_are() -> None:
    columns = np.arange(4 * 10, dtype=np.int64).reshape(4, 10)
    originals: list[Any] = [columns[:, :7], columns[:, 3], np.arange(5, dtype=np.int32), np.empty(0, np.int64)]

    def copying(copy: Copy) -> list[object]:
        return [copy(original) for original in originals]

    size = copied_bytes(copying)
    room = Room(size)
    copies = [room.copy(original) for original in originals]
    expected = [original.copy() for original in originals]
    beyond = room.copy(columns)
    columns[:] = -1
    for copy, kept, original in zip(copies, expected, originals, strict=True):
        assert copy.dtype == original.dtype
        assert copy.flags.c_contiguous
        assert (copy == kept).all()
        if copy.size:
            assert copy.base is not None
    assert (beyond == np.arange(40).reshape(4, 10)).all()
    assert Room(0).copy(columns).tolist() == columns.tolist()
