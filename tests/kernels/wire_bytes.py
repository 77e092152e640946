"""Protobuf bytes of every kind, well-formed and not, and a reader of them that is not ours.

The reader is protobuf's own, given the project's message descriptors with one change: `string` fields are `bytes`.
Protobuf refuses a whole message for one string that is not UTF-8, where the kernels reject the one play that holds it;
with `bytes` the two must agree on every input there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import strategies as st

from topk_grpc.pb.topk.v1 import play_pb2, shard_service_pb2, topk_service_pb2

VARINT, FIXED64, LENGTH, GROUP, GROUP_END, FIXED32 = range(6)
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def _readers() -> Callable[[str], Any]:
    file = descriptor_pb2.FileDescriptorProto(name="bytes_for_strings.proto", package="loose", syntax="proto3")
    for message in (
        *(play_pb2.Play, play_pb2.PlayBatch, topk_service_pb2.StreamPlaysRequest),
        *(shard_service_pb2.ShardPlay, shard_service_pb2.ShardBatch, shard_service_pb2.AppendRequest),
    ):
        described = file.message_type.add()
        message.DESCRIPTOR.CopyToProto(described)
        for field in described.field:
            if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
            if field.type_name:
                field.type_name = field.type_name.replace(".topk.v1.", ".loose.")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"loose.{name}"))


_reader = _readers()
LooseRequest = _reader("StreamPlaysRequest")
LooseAppend = _reader("AppendRequest")


def has_number_zero(message: Any) -> bool:
    """Whether a group that the reader skipped has a field of number 0 in it, at any depth."""

    def within(unknown: Any) -> bool:
        return any(field.field_number == 0 or (field.wire_type == GROUP and within(field.data)) for field in unknown)

    below: list[Any] = []
    for field, value in message.ListFields():
        if field.message_type is not None:
            below.extend(value if field.is_repeated else [value])
    return within(UnknownFieldSet(message)) or any(map(has_number_zero, below))


def varint(value: int, size: int = 0) -> bytes:
    """A varint, of `size` bytes where that is more than it needs."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 128 or len(out) + 1 < size:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number: int, kind: int, size: int = 0) -> bytes:
    return varint(number << 3 | kind, size)


def number_field(number: int, value: int) -> bytes:
    return tag(number, VARINT) + varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    return tag(number, LENGTH) + varint(len(value)) + value


def group(number: int, content: bytes = b"") -> bytes:
    return tag(number, GROUP) + content + tag(number, GROUP_END)


def nested_groups(depth: int) -> bytes:
    return tag(15, GROUP) * depth + tag(15, GROUP_END) * depth


def play(*fields: bytes) -> bytes:
    """A play as field 4 of a batch."""
    return bytes_field(4, b"".join(fields))


def request(*batch_fields: bytes) -> bytes:
    """A request with one batch."""
    return bytes_field(1, b"".join(batch_fields))


# --- Strategies -------------------------------------------------------------------------------------------------------

pads = st.sampled_from([0, 0, 0, 0, 2, 3, 5])
value_pads = st.sampled_from([0, 0, 0, 0, 2, 9, 10])
int64s = st.one_of(
    st.integers(INT64_MIN, INT64_MAX),
    st.integers(-2, 2),
    st.sampled_from([INT64_MIN, INT64_MAX, (1 << 55) - 1, 1 << 55, (1 << 55) + 1]),
)
times = st.one_of(st.integers(1_600_000_000_000, 1_800_000_000_000), int64s, st.integers(946_684_799, 946_684_801))
counts = st.one_of(st.integers(1, 5), int64s)
unknown_numbers = st.one_of(st.integers(6, 40), st.sampled_from([(1 << 29) - 1, 1 << 28, 2047, 2048]))
ids = st.one_of(
    st.text(max_size=12).map(str.encode),
    st.binary(max_size=6),
    st.sampled_from([b"a" * 128, b"b" * 129, b"\xc3\xa9" * 64, b"\xc3\xa9" * 65]),
)
charts = st.one_of(
    st.sampled_from([b"", b"de", b"fr", b"rock", b"c" * 64, b"d" * 65, b"\xff"]),
    st.text("abc", max_size=2).map(str.encode),
)


def varint_fields(numbers: st.SearchStrategy[int], values: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.builds(lambda n, v, p, q: tag(n, VARINT, p) + varint(v, q), numbers, values, pads, value_pads)


def length_fields(numbers: st.SearchStrategy[int], values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(lambda n, v, p, q: tag(n, LENGTH, p) + varint(len(v), q) + v, numbers, values, pads, pads)


def fixed_fields(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    eight = st.builds(lambda n, v, p: tag(n, FIXED64, p) + v, numbers, st.binary(min_size=8, max_size=8), pads)
    four = st.builds(lambda n, v, p: tag(n, FIXED32, p) + v, numbers, st.binary(min_size=4, max_size=4), pads)
    return eight | four


any_fields = st.recursive(
    varint_fields(st.integers(1, 60), int64s)
    | length_fields(st.integers(1, 60), st.binary(max_size=4))
    | fixed_fields(st.integers(1, 60)),
    lambda inner: st.builds(
        lambda n, content, p, q: tag(n, GROUP, p) + b"".join(content) + tag(n, GROUP_END, q),
        st.integers(1, 60),
        st.lists(inner, max_size=3),
        pads,
        pads,
    ),
    max_leaves=5,
)


def groups(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda n, content, p, q: tag(n, GROUP, p) + b"".join(content) + tag(n, GROUP_END, q),
        numbers,
        st.lists(any_fields, max_size=3),
        pads,
        pads,
    )


unknown_fields = st.one_of(
    varint_fields(unknown_numbers, int64s),
    length_fields(unknown_numbers, st.binary(max_size=6)),
    fixed_fields(unknown_numbers),
    groups(unknown_numbers),
)


def misplaced(varints: list[int], lengths: list[int]) -> st.SearchStrategy[bytes]:
    """Known numbers under wire types that are not theirs."""
    wrong = [
        varint_fields(st.sampled_from(lengths), int64s),
        fixed_fields(st.sampled_from(varints + lengths)),
        groups(st.sampled_from(varints + lengths)),
    ]
    if varints:
        wrong.append(length_fields(st.sampled_from(varints), st.binary(max_size=6)))
    return st.one_of(wrong)


def fields_of(*kinds: st.SearchStrategy[bytes], most: int) -> st.SearchStrategy[bytes]:
    """Fields of all these kinds in any order, repeated and left out."""
    return st.lists(st.one_of(*kinds), max_size=most).map(b"".join)


plays = fields_of(
    length_fields(st.just(1), ids),
    varint_fields(st.just(2), times),
    varint_fields(st.just(3), counts),
    length_fields(st.just(4), charts),
    length_fields(st.just(4), st.text("abc", min_size=1, max_size=2).map(str.encode)),
    varint_fields(st.just(5), int64s),
    unknown_fields,
    misplaced([2, 3, 5], [1, 4]),
    most=14,
)
"""What a Play or ShardPlay holds, in any shape that a writer may give it."""

usual_plays = st.builds(
    lambda song, time, more: bytes_field(1, song) + number_field(2, time) + more,
    st.text(min_size=1, max_size=12).map(str.encode),
    st.integers(1_600_000_000_000, 1_800_000_000_000),
    fields_of(
        length_fields(st.just(4), charts),
        length_fields(st.just(4), st.text("abc", min_size=1, max_size=2).map(str.encode)),
        unknown_fields,
        most=14,
    ),
)

batches = fields_of(
    length_fields(st.just(1), ids),
    varint_fields(st.just(2), int64s),
    varint_fields(st.just(3), int64s),
    length_fields(st.just(4), plays),
    length_fields(st.just(4), usual_plays),
    unknown_fields,
    misplaced([2, 3], [1, 4]),
    most=8,
)

requests = fields_of(
    length_fields(st.just(1), batches),
    length_fields(st.just(1), batches),
    unknown_fields,
    misplaced([], [1]),
    most=4,
)

append_requests = fields_of(
    length_fields(st.just(3), batches),
    varint_fields(st.sampled_from([1, 2]), int64s),
    unknown_fields,
    misplaced([1, 2], [3]),
    most=6,
)


@st.composite
def damaged(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """A message with bytes changed, taken out, put in or cut off."""
    data = bytearray(draw(messages))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0 if at < len(data):
                data[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 10, 34, 127, 128, 255])))
            case 1:
                del data[at : at + draw(st.integers(1, 3))]
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=3))
            case _:
                del data[at:]
    return bytes(data)
