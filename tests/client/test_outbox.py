"""The outbox against a naive list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_grpc.client.outbox import Outbox
from topk_grpc.errors import SettingError, WrongServerError


@given(span=st.integers(1, 63), first=st.integers(1, 1000), data=st.data())
def test_outbox_sends_everything_unacknowledged_in_order_within_the_bound(
    span: int, first: int, data: st.DataObject
) -> None:
    outbox = Outbox(first, span)
    unacknowledged: list[int] = []  # the oracle: sequences in order
    sent_here: list[int] = []  # on the present stream
    sends: dict[int, int] = {}
    following = first
    for action in data.draw(st.lists(st.sampled_from(["add", "add", "send", "send", "ack", "stream"]), max_size=150)):
        lowest = unacknowledged[0] if unacknowledged else following
        assert outbox.lowest_unacknowledged == lowest
        assert outbox.next_sequence == following
        assert outbox.has_room == (following - lowest < span)
        if action == "add" and outbox.has_room:
            assert outbox.add(b"", 1) == following
            unacknowledged.append(following)
            following += 1
        elif action == "send":
            due = [sequence for sequence in unacknowledged if sequence not in sent_here]
            batch = outbox.next_to_send()
            assert (batch.sequence if batch else None) == (due[0] if due else None)
            if batch is not None:
                sent_here.append(batch.sequence)
                sends[batch.sequence] = sends.get(batch.sequence, 0) + 1
                assert batch.sends == sends[batch.sequence]
                assert batch.sequence < lowest + 64
        elif action == "ack" and sent_here:
            sequence = data.draw(st.sampled_from(sent_here))
            batch = outbox.acknowledge(sequence)
            assert (batch is not None) == (sequence in unacknowledged)
            if sequence in unacknowledged:
                unacknowledged.remove(sequence)
        elif action == "stream":
            outbox.begin_stream()
            sent_here = []
    assert len(outbox) == len(unacknowledged)


def test_outbox_refuses_an_acknowledgement_of_what_was_not_sent_on_this_stream() -> None:
    outbox = Outbox(1, 16)
    outbox.add(b"", 1)
    with pytest.raises(WrongServerError):
        outbox.acknowledge(1)
    outbox.next_to_send()
    outbox.begin_stream()
    with pytest.raises(WrongServerError):
        outbox.acknowledge(1)
    with pytest.raises(WrongServerError):
        outbox.acknowledge(2)
    assert outbox.next_to_send() is not None
    assert outbox.acknowledge(1) is not None
    assert outbox.acknowledge(1) is None


@pytest.mark.parametrize(("first", "span"), [(0, 16), (1, 0), (1, 64)])
def test_outbox_refuses_numbers_out_of_range(first: int, span: int) -> None:
    with pytest.raises(SettingError):
        Outbox(first, span)
