"""`python -m tests.faults.shard …`: the real `topk shard`, on a file system that fails when the test says so."""

from __future__ import annotations

import typer

from tests.faults.files import FaultyFiles
from topk_grpc.cli import settings
from topk_grpc.cli.main import run_commands
from topk_grpc.cli.serve import run_shard
from topk_grpc.config import ShardSettings


def run(role: ShardSettings) -> None:
    run_shard(role, FaultyFiles.from_environment(role.data_dir))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(settings.command_from(ShardSettings, run))
    run_commands(app)
