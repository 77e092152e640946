"""Reads a container's arguments and environment as the command `topk` would, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from unittest import mock

import typer

from topk_grpc.cli.main import app
from topk_grpc.cli.settings import ROLES
from topk_grpc.errors import SettingError

_TOP: Final[Any] = typer.main.get_command(app)


class UnusableError(Exception):
    """The command would refuse to run; the message says why."""


def role_of(arguments: Sequence[str]) -> str:
    """The command of a container: `topk shard`."""
    return f"topk {arguments[0]}" if arguments else "topk"


def settings_of(arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """The settings that a server would have.

    Raises:
        UnusableError: it would not start.
    """
    role = role_of(arguments)
    if role not in ROLES:
        raise UnusableError(f"{role} is no server's command")
    try:
        return ROLES[role](**parse(arguments, environment))
    except SettingError as error:
        raise UnusableError(str(error)) from error


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The options of a command.

    Raises:
        UnusableError: there is no such command or option, or a value is not allowed.
    """
    command, rest = find(arguments)
    with mock.patch.dict("os.environ", environment, clear=True):
        try:
            return dict(command.make_context("topk", list(rest)).params)
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("click", "typer"):
                raise
            raise UnusableError(getattr(error, "message", str(error))) from error


def variables_of(arguments: Sequence[str]) -> set[str]:
    """The environment variables that a command reads."""
    command, _ = find(arguments)
    return {str(option.envvar) for option in command.params if getattr(option, "envvar", None)}


def find(arguments: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """A command and what is left of the arguments.

    Raises:
        UnusableError: there is none of that name.
    """
    command, rest = _TOP, list(arguments)
    while hasattr(command, "commands") and rest:
        name = rest.pop(0)
        if name not in command.commands:
            raise UnusableError(f"there is no command {name!r}")
        command = command.commands[name]
    return command, rest
