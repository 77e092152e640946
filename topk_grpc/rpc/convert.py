"""Messages of topk.v1 and values of model.py, both ways.

`…_to_pb` writes, `…_from_pb` reads and checks: what a message can say and a value cannot raises InvalidArgumentError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

from topk_grpc import model
from topk_grpc.errors import InvalidArgumentError, WindowError
from topk_grpc.pb.topk.v1 import play_pb2, query_pb2, shard_service_pb2, topk_service_pb2

_INT64: Final = range(-(1 << 63), 1 << 63)

_FINALITY_TO_PB: Final = {
    model.Finality.PRELIMINARY: query_pb2.FINALITY_PRELIMINARY,
    model.Finality.FINAL: query_pb2.FINALITY_FINAL,
}


# --- What a query names -----------------------------------------------------------------------------------------------


def window_to_pb(window: model.Window) -> query_pb2.Window:
    """Writes a window."""
    match window:
        case model.GlobalWindow():
            return query_pb2.Window(**{"global": query_pb2.GlobalWindow()})  # type: ignore[arg-type]  # a keyword of Python
        case model.TumblingWindow(size_ms, offset_ms):
            return query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=size_ms, offset_ms=offset_ms))
        case model.SlidingWindow(size_ms, slide_ms):
            return query_pb2.Window(sliding=query_pb2.SlidingWindow(size_ms=size_ms, slide_ms=slide_ms))
        case model.SessionWindow(gap_ms):
            return query_pb2.Window(session=query_pb2.SessionWindow(gap_ms=gap_ms))
        case model.RangeWindow(start_ms, end_ms):
            return query_pb2.Window(range=query_pb2.RangeWindow(start_ms=start_ms, end_ms=end_ms))


def window_from_pb(message: query_pb2.Window | None) -> model.Window:
    """Reads a window.

    Raises:
        InvalidArgumentError: there is none, or of a kind this release does not know.
        WindowError: it makes no sense.
    """
    kind = None if message is None else message.WhichOneof("kind")
    if message is None or kind is None:
        raise InvalidArgumentError(
            "the request names no window that this server knows: set window.global, tumbling, sliding, session or range"
        )
    match kind:
        case "global":
            return model.GlobalWindow()
        case "tumbling":
            return model.TumblingWindow(message.tumbling.size_ms, message.tumbling.offset_ms)
        case "sliding":
            return model.SlidingWindow(message.sliding.size_ms, message.sliding.slide_ms)
        case "session":
            return model.SessionWindow(message.session.gap_ms)
        case "range":
            return model.RangeWindow(message.range.start_ms, message.range.end_ms)


def as_of_to_pb(as_of: model.AsOf | str) -> query_pb2.AsOf | None:
    """Writes an instant; None for the gateway's clock, which is a field left out.

    Raises:
        InvalidArgumentError: text that is no time, or a time beyond 64 bits.
    """
    match model.as_of_ms(as_of):
        case None:
            return None
        case "latest":
            return query_pb2.AsOf(latest=query_pb2.Latest())
        case time_ms:
            if time_ms not in _INT64:
                raise InvalidArgumentError(f"the time {time_ms} ms does not fit 64 bits")
            return query_pb2.AsOf(time_ms=time_ms)


def as_of_from_pb(
    request: topk_service_pb2.GetTopKRequest | topk_service_pb2.GetSongsRequest,
) -> int | Literal["latest"] | None:
    """Reads the instant of a request: epoch milliseconds, `latest`, or None for the gateway's clock.

    Raises:
        InvalidArgumentError: `as_of` is there but says nothing this release knows.
    """
    if not request.HasField("as_of"):
        return None
    instant = request.as_of.WhichOneof("instant")
    if instant is None:
        raise InvalidArgumentError(
            "the request's as_of is empty: set time_ms or latest, or leave as_of out for the gateway's clock"
        )
    return "latest" if instant == "latest" else request.as_of.time_ms


# --- Plays and acknowledgements ---------------------------------------------------------------------------------------


def play_to_pb(play: model.Play) -> play_pb2.Play:
    """Writes a play; a count of 1 is left out, as absent means 1."""
    message = play_pb2.Play(song_id=play.song_id, played_at_ms=play.played_at_ms, charts=play.charts)
    if play.count != 1:
        message.count = play.count
    return message


def play_from_pb(message: play_pb2.Play) -> model.Play:
    """Reads a play as it came; whether it counts is for the servers to say."""
    count = message.count if message.HasField("count") else 1
    return model.Play(message.song_id, message.played_at_ms, count, tuple(message.charts))


def rejected_to_pb(rejected: model.Rejected) -> play_pb2.RejectedPlay:
    """Writes a rejected play; its sequence is the answer's."""
    return play_pb2.RejectedPlay(index=rejected.index, reason=rejected.reason, message=rejected.message)


def rejected_from_pb(
    message: play_pb2.RejectedPlay, sequence: int = 0, play: model.Play | None = None
) -> model.Rejected:
    """Reads a rejected play of the batch `sequence`."""
    return model.Rejected(message.index, message.reason, message.message, sequence, play)


def ack_to_stream_pb(ack: model.BatchAck) -> topk_service_pb2.StreamPlaysResponse:
    """Writes an acknowledgement on a stream."""
    rejected = map(rejected_to_pb, ack.rejected)
    return topk_service_pb2.StreamPlaysResponse(
        sequence=ack.sequence, accepted=ack.accepted, duplicate=ack.duplicate, rejected=rejected
    )


def ack_to_record_pb(ack: model.BatchAck) -> topk_service_pb2.RecordPlaysResponse:
    """Writes the acknowledgement of a single batch."""
    rejected = map(rejected_to_pb, ack.rejected)
    return topk_service_pb2.RecordPlaysResponse(
        sequence=ack.sequence, accepted=ack.accepted, duplicate=ack.duplicate, rejected=rejected
    )


def ack_from_pb(message: topk_service_pb2.StreamPlaysResponse | topk_service_pb2.RecordPlaysResponse) -> model.BatchAck:
    """Reads an acknowledgement."""
    rejected = tuple(rejected_from_pb(each, message.sequence) for each in message.rejected)
    return model.BatchAck(message.sequence, message.accepted, message.duplicate, rejected)


# --- Answers ----------------------------------------------------------------------------------------------------------


def bounds_to_pb(bounds: model.Bounds | None) -> query_pb2.WindowBounds | None:
    """Writes a window's bounds; None, a field left out, for the global window."""
    return None if bounds is None else query_pb2.WindowBounds(start_ms=bounds.start_ms, end_ms=bounds.end_ms)


def bounds_from_pb(message: query_pb2.WindowBounds | None) -> model.Bounds | None:
    """Reads a window's bounds; None stays None.

    Raises:
        WindowError: they end before they start.
    """
    if message is None:
        return None
    if message.end_ms < message.start_ms:
        raise WindowError(f"a window ends at {message.end_ms} ms, before it starts at {message.start_ms} ms")
    return model.Bounds(message.start_ms, message.end_ms)


def entry_to_pb(entry: model.Entry) -> query_pb2.Entry:
    """Writes a ranked song."""
    return query_pb2.Entry(**_entry_fields(entry))


def _entry_fields(entry: model.Entry) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "rank": entry.rank, "song_id": entry.song_id, "count": entry.count, "share": entry.share
    }  # fmt: skip
    if entry.session is not None:
        fields |= {"session_start_ms": entry.session.start_ms, "session_end_ms": entry.session.end_ms}
    if entry.history is not None:
        fields["history"] = query_pb2.ChartHistory(
            previous_rank=entry.history.previous_rank,
            peak_rank=entry.history.peak_rank,
            panes_on_chart=entry.history.panes_on_chart,
        )
    return fields


def entry_from_pb(message: query_pb2.Entry) -> model.Entry:
    """Reads a ranked song."""
    history = None
    if message.HasField("history"):
        told = message.history
        previous_rank = told.previous_rank if told.HasField("previous_rank") else None
        history = model.ChartHistory(previous_rank, told.peak_rank, told.panes_on_chart)
    return model.Entry(message.rank, message.song_id, message.count, message.share, session_from_pb(message), history)


def session_from_pb(
    message: query_pb2.Entry | topk_service_pb2.SongStanding | shard_service_pb2.Place,
) -> model.Bounds | None:
    """Reads how far a session reaches; None where the message says nothing of one."""
    if not message.HasField("session_start_ms"):
        return None
    return model.Bounds(message.session_start_ms, message.session_end_ms)


def _entries(messages: Iterable[query_pb2.Entry]) -> tuple[model.Entry, ...]:
    return tuple(map(entry_from_pb, messages))


def certificate_to_pb(certificate: model.Certificate) -> query_pb2.Certificate:
    """Writes a certificate."""
    return query_pb2.Certificate(
        complete=certificate.complete,
        missing_shards=certificate.missing_shards,
        epoch=certificate.epoch,
        watermark_ms=certificate.watermark_ms,
        finality=_FINALITY_TO_PB[certificate.finality],
        total_plays=certificate.total_plays,
        distinct_songs=certificate.distinct_songs,
        other_plays=certificate.other_plays,
    )


def certificate_from_pb(message: query_pb2.Certificate) -> model.Certificate:
    """Reads a certificate; a finality unknown to this release is read as PRELIMINARY, which promises nothing."""
    final = message.finality == query_pb2.FINALITY_FINAL
    return model.Certificate(
        complete=message.complete,
        missing_shards=tuple(message.missing_shards),
        epoch=message.epoch,
        watermark_ms=message.watermark_ms,
        finality=model.Finality.FINAL if final else model.Finality.PRELIMINARY,
        total_plays=message.total_plays,
        distinct_songs=message.distinct_songs if message.HasField("distinct_songs") else None,
        other_plays=message.other_plays,
    )


def answer_to_pb(answer: model.Answer) -> topk_service_pb2.GetTopKResponse:
    """Writes the k best of a window."""
    message = topk_service_pb2.GetTopKResponse(
        bounds=bounds_to_pb(answer.bounds), certificate=certificate_to_pb(answer.certificate)
    )
    add = message.entries.add  # in place: copying as many messages in takes four times as long
    for entry in answer.entries:
        add(**_entry_fields(entry))
    return message


def answer_from_pb(message: topk_service_pb2.GetTopKResponse) -> model.Answer:
    """Reads the k best of a window."""
    bounds = bounds_from_pb(message.bounds if message.HasField("bounds") else None)
    return model.Answer(bounds, certificate_from_pb(message.certificate), _entries(message.entries))


def standing_to_pb(standing: model.SongStanding) -> topk_service_pb2.SongStanding:
    """Writes where one song stands."""
    return topk_service_pb2.SongStanding(
        song_id=standing.song_id,
        count=standing.count,
        rank=standing.rank,
        above=map(entry_to_pb, standing.above),
        below=map(entry_to_pb, standing.below),
        share=standing.share,
        session_start_ms=standing.session.start_ms if standing.session else None,
        session_end_ms=standing.session.end_ms if standing.session else None,
    )


def standing_from_pb(message: topk_service_pb2.SongStanding) -> model.SongStanding:
    """Reads where one song stands."""
    rank = message.rank if message.HasField("rank") else None
    return model.SongStanding(
        message.song_id,
        message.count,
        rank,
        _entries(message.above),
        _entries(message.below),
        message.share,
        session_from_pb(message),
    )


def songs_answer_to_pb(answer: model.SongsAnswer) -> topk_service_pb2.GetSongsResponse:
    """Writes the standings of given songs."""
    return topk_service_pb2.GetSongsResponse(
        bounds=bounds_to_pb(answer.bounds),
        certificate=certificate_to_pb(answer.certificate),
        songs=map(standing_to_pb, answer.songs),
    )


def songs_answer_from_pb(message: topk_service_pb2.GetSongsResponse) -> model.SongsAnswer:
    """Reads the standings of given songs."""
    bounds = bounds_from_pb(message.bounds if message.HasField("bounds") else None)
    return model.SongsAnswer(
        bounds, certificate_from_pb(message.certificate), tuple(map(standing_from_pb, message.songs))
    )


def chart_to_pb(chart: model.ChartSummary) -> topk_service_pb2.ChartSummary:
    """Writes a chart."""
    return topk_service_pb2.ChartSummary(
        chart=chart.chart, total_plays=chart.total_plays, distinct_songs=chart.distinct_songs
    )


def chart_from_pb(message: topk_service_pb2.ChartSummary) -> model.ChartSummary:
    """Reads a chart."""
    distinct_songs = message.distinct_songs if message.HasField("distinct_songs") else None
    return model.ChartSummary(message.chart, message.total_plays, distinct_songs)
