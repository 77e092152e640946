"""Makes command-line options out of the tables of config.py, and docs/settings.md too.

A role's command has no parameters of its own: its signature is made at import from the settings class, one option a
field. So a new setting is one line in config.py, and flag, environment variable, range check and help follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import typer

from topk_grpc.config import (
    ControllerSettings,
    GatewaySettings,
    LeaveSettings,
    ServerSettings,
    SettingInfo,
    ShardSettings,
    describe,
)
from topk_grpc.errors import SettingError

STORE: Final = ("etcd_ca", "etcd_cert", "etcd_key", "etcd_user", "etcd_password_file")
"""Settings of the way to a topology store."""

ROLES: Final[Mapping[str, type]] = {
    "topk shard": ShardSettings,
    "topk gateway": GatewaySettings,
    "topk controller": ControllerSettings,
}
"""The settings of each role, by its command."""

OWNED_BY_UP: Final = frozenset(
    {"topology", "listen", "health_port", "metrics_port", "exit_with_stdin", "drain_delay_seconds"}
    | {"shard_id", "data_dir", "advertise", "join"}
    | {"create_shards", "shard_prefix", "partitioner", "slots"}
    | {"topology_wait_seconds", *STORE}
)
"""Settings that `topk up` decides for its children, or has no use for: its topology is a file."""


def command_from(settings_class: type, run: Callable[[Any], None]) -> Callable[..., None]:
    """Makes a typer command that takes each setting of a role as an option.

    Args:
        settings_class: one of config.py.
        run: is called with the settings.

    Returns:
        A function for `app.command()`; its docstring is that of `run`.
    """

    def command(**values: Any) -> None:
        try:
            settings = settings_class(**values)
        except SettingError as error:
            raise typer.BadParameter(str(error)) from error
        run(settings)

    _give_signature(command, [_parameter(info, info.default) for info in describe(settings_class)])
    command.__doc__ = run.__doc__
    return command


def tunables() -> list[SettingInfo]:
    """What `topk up` passes on to its children: the settings of all roles that it does not decide itself."""
    found: dict[str, SettingInfo] = {}
    for settings_class in ROLES.values():
        for info in describe(settings_class):
            if info.name not in OWNED_BY_UP:
                found.setdefault(info.name, info)
    return list(found.values())


def with_tunables(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for each tunable setting to a command.

    Args:
        command: takes its own parameters and, as `environment`, a mapping of the tunables given, by variable.
    """
    infos = tunables()

    def environment(values: Mapping[str, Any]) -> dict[str, str]:
        given = {info.variable: values[info.name] for info in infos if values[info.name] is not None}
        return {variable: _as_text(value) for variable, value in given.items()}

    options = [_parameter(info, None, "Settings of the servers") for info in infos]
    return _with_options(command, options, "environment", environment)


def with_store(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of the way to a topology store to a command.

    Args:
        command: takes its own parameters and, as `store`, a mapping of these settings, by name.
    """
    infos = [info for info in describe(ServerSettings) if info.name in STORE]
    options = [_parameter(info, info.default, "Where the topology is in etcd") for info in infos]
    return _with_options(command, options, "store", lambda values: {info.name: values[info.name] for info in infos})


def _with_options(
    command: Callable[..., None],
    options: Iterable[inspect.Parameter],
    name: str,
    gather: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Callable[..., None]:
    """A command with more options, of which it gets as the parameter `name` what `gather` makes of their values."""
    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != name]
    own_names = {each.name for each in own}

    def wrapped(**values: Any) -> None:
        command(**{each: values[each] for each in own_names}, **{name: gather(values)})

    _give_signature(wrapped, [*(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own), *options])
    wrapped.__doc__ = command.__doc__
    return wrapped


def _span(info: SettingInfo) -> str:
    low = "" if info.low is None else f"{info.low:,}"
    high = "" if info.high is None else f"{info.high:,}"
    return f"{low} to {high}" if low and high else f"from {low}" if low else f"up to {high}" if high else ""


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parameter(info: SettingInfo, default: Any, panel: str | None = None) -> inspect.Parameter:
    """One option. A default of None where the setting has one means: not given, the server decides."""
    shown: bool | str = True
    if default is None and info.default is not None:
        shown = str(info.default)
    required = info.default is None
    option = typer.Option(
        ... if required else default,
        info.flag,
        envvar=info.variable,
        help=info.help,
        metavar=None if info.kind is bool else info.unit or "TEXT",
        min=info.low if info.kind in (int, float) else None,
        max=info.high if info.kind in (int, float) else None,
        show_default=shown if info.default != "" else False,
        rich_help_panel=panel,
    )
    annotation: Any = info.kind if required or default is not None else info.kind | None
    return inspect.Parameter(info.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _give_signature(function: Callable[..., None], parameters: Iterable[inspect.Parameter]) -> None:
    listed = list(parameters)
    function.__signature__ = inspect.Signature(listed, return_annotation=None)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in listed}


# --- docs/settings.md -------------------------------------------------------------------------------------------------

_HEAD: Final = """\
# Settings

<!-- Written from topk_grpc/config.py by `python -m topk_grpc.cli.settings > docs/settings.md`; a test compares. -->

Every setting is a flag and an environment variable; the flag wins. `topk up` takes those of its shards, its gateway
and its controller that it does not decide itself (addresses, names and directories) in the same two ways and hands them
on.
"""


def markdown() -> str:
    """The text of docs/settings.md."""
    parts = [_HEAD]
    for command, settings_class in {**ROLES, "topk leave": LeaveSettings}.items():
        parts.append(f"\n## {command}\n\n| flag | variable | default | unit | range | what it does |\n{'|---' * 6}|\n")
        parts.extend(_row(info) for info in describe(settings_class))
    return "".join(parts)


def _row(info: SettingInfo) -> str:
    default = "required" if info.default is None else f"`{_as_text(info.default)}`" if info.default != "" else "empty"
    help_text = info.help.replace("|", "\\|")
    return f"| `{info.flag}` | `{info.variable}` | {default} | {info.unit} | {_span(info)} | {help_text} |\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201 - that is what it is for
