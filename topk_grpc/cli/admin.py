"""How commands that change a running cluster call its gateway, and the first of them: `topk cluster delete-song`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

import grpc
import typer

from topk_grpc.cli.queries import ask
from topk_grpc.cli.reach import Reach, unreachable
from topk_grpc.errors import TopKError, UnavailableError
from topk_grpc.pb.topk.v1 import admin_service_pb2 as pb
from topk_grpc.pb.topk.v1.admin_service_pb2_grpc import ClusterAdminServiceStub
from topk_grpc.rpc.status import from_rpc_error

_SECONDS: Final = 60.0


def call(gateway: Reach, method: str, request: Any) -> Any:
    """As `call_async`, for commands that call once."""
    return asyncio.run(call_async(gateway, method, request))


async def call_async(gateway: Reach, method: str, request: Any) -> Any:
    """Calls the admin service of a gateway once.

    Args:
        gateway: where it is.
        method: of ClusterAdminService.
        request: its message.

    Raises:
        TopKError: the cluster does not answer, or refuses.
    """
    connection = gateway.connection()
    try:
        stub = ClusterAdminServiceStub(connection.channel)
        return await getattr(stub, method)(request, timeout=_SECONDS, metadata=connection.metadata())
    except grpc.aio.AioRpcError as error:
        failure: TopKError = from_rpc_error(error)
        if isinstance(failure, UnavailableError):
            failure = unreachable(gateway, failure)
        raise failure from error
    finally:
        await connection.close()


def delete_song(song_id: str, gateway: Reach, *, yes: bool, as_json: bool) -> None:
    """Has all plays of a song taken back, and prints what it had. Asks first, where there is somebody to ask.

    Raises:
        typer.BadParameter: nobody can be asked, and `yes` is not set.
        typer.Abort: the answer was no.
        TopKError: the cluster does not answer, or refuses.
    """
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter(
                f"all plays of {song_id!r} would be deleted for good, and standard input is no terminal to ask at:"
                " add --yes"
            )
        (song,) = ask(gateway, lambda client: client.songs([song_id])).songs
        question = f"Delete {song_id!r} for good, {song.count:,} plays and all it has in charts? [y/N] "
        print(question, end="", file=sys.stderr, flush=True)  # noqa: T201  # typer's own writes to stdout as well
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            raise typer.Abort
    deleted = call(gateway, "DeleteSong", pb.ClusterAdminServiceDeleteSongRequest(song_id=song_id))
    if as_json:
        value = {"song_id": song_id, "plays": deleted.plays, "charts": deleted.charts}
        print(json.dumps(value, ensure_ascii=False))  # noqa: T201
    elif deleted.plays or deleted.charts:
        print(f"{song_id}: {deleted.plays:,} plays deleted, and those in {deleted.charts:,} charts")  # noqa: T201
    else:
        print(f"{song_id} had no plays")  # noqa: T201
