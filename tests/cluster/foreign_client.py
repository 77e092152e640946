# mypy: ignore-errors
"""Somebody else's client: nothing but stock gRPC and code that was generated from the protos. Not a test by itself.

    python foreign_client.py DIRECTORY HOST:PORT CHART

DIRECTORY holds what `python -m grpc_tools.protoc` made. Prints one JSON object with what it saw.
"""

import json
import sys
import time

sys.path.insert(0, sys.argv[1])

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from topk.v1 import play_pb2, query_pb2, topk_service_pb2, topk_service_pb2_grpc

FIRST_MS = 1_700_000_000_000  # 2023-11-14T22:13:20Z
STARTED_MS = time.time_ns() // 1_000_000
SONGS = ("Boston - More Than a Feeling", "Мумий Тролль - Утекай", "🎵")


def batch(producer_id, sequence, chart):
    plays = []
    for index, song_id in enumerate(SONGS):
        plays += [
            play_pb2.Play(song_id=song_id, played_at_ms=FIRST_MS + sequence, charts=[chart]) for _ in range(index + 1)
        ]
    plays.append(play_pb2.Play(song_id=SONGS[0], played_at_ms=FIRST_MS + 86_400_000, count=10, charts=[chart]))
    plays.append(play_pb2.Play(song_id="", played_at_ms=FIRST_MS))
    return play_pb2.PlayBatch(producer_id=producer_id, sequence=sequence, first_sent_ms=STARTED_MS, plays=plays)


def acknowledgement(response):
    return {
        "sequence": response.sequence,
        "accepted": response.accepted,
        "duplicate": response.duplicate,
        "rejected": [[play.index, play.reason] for play in response.rejected],
    }


def entries(response):
    return [[entry.rank, entry.song_id, entry.count] for entry in response.entries]


def main(target, chart):
    seen = {}
    with grpc.insecure_channel(target) as channel:
        stub = topk_service_pb2_grpc.TopKServiceStub(channel)
        requests = [topk_service_pb2.StreamPlaysRequest(batch=batch(chart, sequence, chart)) for sequence in (1, 2, 3)]
        seen["stream"] = [acknowledgement(each) for each in stub.StreamPlays(iter(requests), timeout=20)]
        # The first again, as after a stream that broke, and then a new one.
        again = topk_service_pb2.RecordPlaysRequest(batch=batch(chart, 1, chart))
        seen["again"] = acknowledgement(stub.RecordPlays(again, timeout=20))
        unary = topk_service_pb2.RecordPlaysRequest(batch=batch(chart, 4, chart))
        seen["unary"] = acknowledgement(stub.RecordPlays(unary, timeout=20))

        world = query_pb2.Window(**{"global": query_pb2.GlobalWindow()})
        day = query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=86_400_000))
        answer = stub.GetTopK(topk_service_pb2.GetTopKRequest(window=world, k=2, chart=chart), timeout=20)
        seen["global"] = {
            "entries": entries(answer),
            "bounds": answer.HasField("bounds"),
            "complete": answer.certificate.complete,
            "total_plays": answer.certificate.total_plays,
            "distinct_songs": answer.certificate.distinct_songs,
            "final": answer.certificate.finality == query_pb2.FINALITY_FINAL,
        }
        request = topk_service_pb2.GetTopKRequest(window=day, k=10, chart=chart, as_of=query_pb2.AsOf(time_ms=FIRST_MS))
        answer = stub.GetTopK(request, timeout=20)
        seen["day"] = {"entries": entries(answer), "bounds": [answer.bounds.start_ms, answer.bounds.end_ms]}
        request = topk_service_pb2.GetSongsRequest(
            window=world, song_ids=[SONGS[2], "never played"], chart=chart, neighbours=1
        )
        seen["songs"] = [
            {
                "song_id": song.song_id,
                "count": song.count,
                "rank": song.rank if song.HasField("rank") else None,
                "above": [entry.song_id for entry in song.above],
                "below": [entry.song_id for entry in song.below],
            }
            for song in stub.GetSongs(request, timeout=20).songs
        ]
        described = stub.DescribeCluster(topk_service_pb2.DescribeClusterRequest(), timeout=20)
        seen["cluster"] = {
            "shards": [shard.shard_id for shard in described.shards],
            "reachable": all(shard.reachable for shard in described.shards),
            "slots": [described.slots, sum(shard.slots for shard in described.shards)],
            "partitioner": described.partitioner,
        }
        try:
            stub.GetTopK(topk_service_pb2.GetTopKRequest(window=world, k=0), timeout=20)
        except grpc.RpcError as error:
            seen["error"] = {"code": error.code().name, "details": error.details()}
        health = health_pb2_grpc.HealthStub(channel)
        seen["health"] = {
            service: health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status
            for service in ("", "liveness", "readiness")
        }
        seen["services"] = sorted(ProtoReflectionDescriptorDatabase(channel).get_services())
    seen["ours"] = sorted(name for name in sys.modules if name.startswith("topk_grpc"))
    print(json.dumps(seen))


main(sys.argv[2], sys.argv[3])
