"""Asks the shards for the k best of songs whose plays are spread over them: what threshold.py wants to know."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from topk_grpc.config import GatewaySettings
from topk_grpc.gateway.scatter import Gathered, Scatter
from topk_grpc.gateway.threshold import Place, Question, Search, Told, told_best
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb


async def best_spread(
    scatter: Scatter, settings: GatewaySettings, scope: pb.Scope, k: int, *, allow_partial: bool
) -> tuple[Gathered[Any], Sequence[Place]]:
    """The k best, and the last answers of the shards, by which they are certain.

    Args:
        scatter: asks the shards.
        settings: the gateway's.
        scope: what to count; no sessions. Its bounds are the same in all rounds.
        k: above 0.
        allow_partial: go without shards that do not answer.

    Raises:
        UnavailableError: a shard does not answer within the query's time, and `allow_partial` is not set.
        ResourceExhaustedError: too many songs would have to be looked at.
    """
    deadline = asyncio.get_running_loop().time() + settings.query_seconds
    search = Search(k)
    while True:
        method, request = _request(search.question, scope, k, settings.threshold_entries_max)
        gathered = await scatter.gather(method, request, allow_partial=allow_partial, deadline=deadline)
        # Many entries may be merged: not on the event loop, where others wait.
        places = await asyncio.to_thread(_take, search, k, list(gathered.answers.values()))
        if places is not None:
            return gathered, places


def _request(question: Question | None, scope: pb.Scope, k: int, entries_max: int) -> tuple[str, Any]:
    """The method and the message that ask a shard."""
    if question is None:
        return "QueryTopK", pb.QueryTopKRequest(scope=scope, k=k)
    return "QueryAtLeast", pb.QueryAtLeastRequest(
        scope=scope, count_min=question.count_min, song_ids=question.named, entries_max=entries_max
    )


def _take(search: Search, k: int, answers: Sequence[Any]) -> Sequence[Place] | None:
    """Brings the shards' answers into the search."""
    question = search.question
    if question is None:
        alone = len(answers) == 1
        return search.take([told_best(one.song_ids, one.counts, k, alone=alone) for one in answers])
    told = []
    for answer in answers:
        counts = dict(zip(question.named, answer.asked_counts, strict=True))
        counts.update(zip(answer.song_ids, answer.counts, strict=True))
        told.append(Told(counts, question.count_min - 1))
    return search.take(told)
