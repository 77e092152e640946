"""Options are made of the tables in config.py, and docs/settings.md is their print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from topk_grpc.cli import settings
from topk_grpc.config import ShardSettings, describe

ROOT = Path(__file__).parents[2]
REQUIRED = ["--topology", "file:x", "--shard-id", "s", "--data-dir", "d"]


def parse(arguments: list[str], environment: dict[str, str] | None = None) -> tuple[int, Any, str]:
    """Exit status, the settings that the command got, and the output."""
    found: list[Any] = []
    app = typer.Typer()
    app.command()(settings.command_from(ShardSettings, found.append))
    result = CliRunner().invoke(app, arguments, env=environment or {})
    return result.exit_code, found[0] if found else None, result.output


def test_docs_are_current() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    assert text == settings.markdown(), "run `python -m topk_grpc.cli.settings > docs/settings.md`"


def test_docs_name_every_setting() -> None:
    text = settings.markdown()
    for role in settings.ROLES.values():
        for info in describe(role):
            assert f"`{info.flag}` | `{info.variable}`" in text
            assert info.help


def test_defaults_are_those_of_the_table() -> None:
    code, found, _ = parse(REQUIRED)
    assert code == 0
    assert found == ShardSettings(topology="file:x", shard_id="s", data_dir="d")


def test_flags_and_variables_set_every_kind() -> None:
    arguments = [*REQUIRED, "--heap-size", "77", "--snapshot-seconds", "1.5", "--exit-with-stdin", "--advertise", "h:1"]
    _, by_flag, _ = parse(arguments)
    names = ("TOPK_HEAP_SIZE", "TOPK_SNAPSHOT_SECONDS", "TOPK_EXIT_WITH_STDIN", "TOPK_ADVERTISE")
    _, by_variable, _ = parse(REQUIRED, dict(zip(names, ("77", "1.5", "true", "h:1"), strict=True)))
    assert by_flag == by_variable
    assert (by_flag.heap_size, by_flag.snapshot_seconds, by_flag.exit_with_stdin, by_flag.advertise) == (
        77,
        1.5,
        True,
        "h:1",
    )


def test_the_flag_wins_over_the_variable() -> None:
    assert parse([*REQUIRED, "--heap-size", "5"], {"TOPK_HEAP_SIZE": "6"})[1].heap_size == 5


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        REQUIRED[:-2],
        [*REQUIRED, "--heap-size", "0"],
        [*REQUIRED, "--heap-size", "10001"],
        [*REQUIRED, "--heap-size", "many"],
        [*REQUIRED, "--no-such-setting", "1"],
    ],
)
def test_mistakes_are_usage_errors(arguments: list[str]) -> None:
    code, found, output = parse(arguments)
    assert (code, found) == (2, None)
    assert "Traceback" not in output


def test_help_lists_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    output = parse(["--help"])[2]
    for info in describe(ShardSettings):
        assert info.flag in output
        assert info.variable in output


def test_up_passes_on_what_it_is_given() -> None:
    found: list[Any] = []

    def up(name: str = "x", environment: Any = None) -> None:
        """Runs."""
        found.append((name, environment))

    app = typer.Typer()
    app.command()(settings.with_tunables(up))
    runner = CliRunner()
    assert runner.invoke(app, ["--name", "y", "--heap-size", "50"]).exit_code == 0
    assert runner.invoke(app, [], env={"TOPK_K_MAX": "99", "TOPK_LISTEN": "elsewhere"}).exit_code == 0
    assert runner.invoke(app, ["--heap-size", "0"]).exit_code == 2
    assert found == [("y", {"TOPK_HEAP_SIZE": "50"}), ("x", {"TOPK_K_MAX": "99"})]


def test_every_setting_is_tunable_or_owned_by_up() -> None:
    tunable = {info.name for info in settings.tunables()}
    everything = {info.name for role in settings.ROLES.values() for info in describe(role)}
    assert tunable | settings.OWNED_BY_UP == everything
    assert not tunable & settings.OWNED_BY_UP


def test_docs_name_every_command() -> None:
    from topk_grpc.cli.main import app, bench_app, cluster_app, token_app

    def names(group: typer.Typer) -> list[str]:
        return [command.name or command.callback.__name__ for command in group.registered_commands if command.callback]

    text = (ROOT / "docs" / "cli.md").read_text()
    for command in [
        *names(app),
        *(f"cluster {name}" for name in names(cluster_app)),
        *(f"token {name}" for name in names(token_app)),
        "bench",
        *(f"bench {name}" for name in names(bench_app)),
    ]:
        assert f"| `topk {command}` |" in text
