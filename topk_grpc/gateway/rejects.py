"""What a rejected play's reason says to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from topk_grpc.config import GatewaySettings
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb

SHARD_REASONS: Final[Mapping[int, str]] = {
    pb.REJECT_REASON_IN_FUTURE: "IN_FUTURE",
    pb.REJECT_REASON_CHART_LIMIT: "CHART_LIMIT",
    pb.REJECT_REASON_MEMORY_LIMIT: "MEMORY_LIMIT",
    pb.REJECT_REASON_TOTAL_OVERFLOW: "TOTAL_OVERFLOW",
    pb.REJECT_REASON_NEGATIVE_BUCKET: "NEGATIVE_BUCKET",
}


def reject_messages(settings: GatewaySettings) -> Mapping[str, str]:
    """A sentence for each reason: what is wrong and what to do."""
    return {
        "EMPTY_SONG_ID": f"song_id is empty: give 1 to {settings.song_id_bytes_max} bytes of UTF-8",
        "SONG_ID_TOO_LONG": f"song_id is longer than {settings.song_id_bytes_max} bytes of UTF-8: shorten or hash it",
        "INVALID_UTF8": "song_id or a chart is not well-formed UTF-8: encode it so",
        "MISSING_TIME": "played_at_ms is absent or 0: give the time of the play in milliseconds since the Unix epoch",
        "TIME_OUT_OF_RANGE": "played_at_ms is more than 2^60 ms from the epoch: give milliseconds since the Unix epoch",
        "SECONDS_NOT_MILLISECONDS": "played_at_ms lies in early 1970, but is recent in seconds: multiply it by 1,000",
        "IN_FUTURE": "played_at_ms is too far ahead of the shard's clock: check the sender's clock and unit",
        "ZERO_COUNT": "count is 0: leave it out for 1, or leave the play out",
        "COUNT_TOO_LARGE": "count is beyond 2^55 or -2^55: no sum of such counts would be exact",
        "TOO_MANY_CHARTS": f"more than {settings.charts_per_play_max} charts: name fewer",
        "EMPTY_CHART": "a chart's name is empty: the global chart need not be named",
        "CHART_TOO_LONG": f"a chart's name is longer than {settings.chart_bytes_max} bytes of UTF-8: shorten it",
        "CHART_LIMIT": "there are as many charts as there may be (--charts-max): ids of users or songs make no charts",
        "MEMORY_LIMIT": "the shard's memory is used up and the song is new: add shards or raise --memory-bytes-max",
        "TOTAL_OVERFLOW": "the shard's total would leave the range that sums exactly (2^55): the counts must be wrong",
        "CORRECTION_UNSUPPORTED": "count is negative, and the cluster's partitioner spreads a song's plays over shards"
        " that do not know each other's: leave such plays out, or load all into a cluster made with --partitioner ring",
        "NEGATIVE_BUCKET": "count would take back more plays than the song has in the play's time bucket, in the global"
        " chart or one that it names: nothing was taken back; give the time, charts and count that were recorded",
    }
