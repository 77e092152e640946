"""How client commands reach a cluster: one group of options for all of them.

A command that takes a parameter `gateway` and is decorated with `with_reach` gets a `Reach` there, and the options
--gateway, --tls…, --token-file and --plaintext on its command line. A token itself is no option: it would stand in the
list of processes and in the shell's history.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from topk_grpc.errors import UnavailableError

if TYPE_CHECKING:
    from topk_grpc.client import TopKClient
    from topk_grpc.rpc.connection import Connection

GATEWAY_DEFAULT: Final = "127.0.0.1:50050"
TOKEN_VARIABLE: Final = "TOPK_TOKEN"

_PANEL: Final = "The cluster, and who asks"


def _option(name: str, default: Any, kind: Any, text: str, metavar: str | None = None) -> inspect.Parameter:
    option = typer.Option(
        default,
        "--" + name.replace("_", "-"),
        envvar="TOPK_" + name.upper(),
        help=text,
        metavar=metavar,
        show_default=bool(default),
        rich_help_panel=_PANEL,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


_OPTIONS: Final = (
    _option(
        "gateway",
        GATEWAY_DEFAULT,
        str,
        "The gateway; several with commas between them, or a dns:///NAME:PORT, share the load.",
        "HOST:PORT[,…]",
    ),
    _option("tls", False, bool, "Speak TLS, and trust the public CAs. The options below imply it."),
    _option("tls_ca", "", str, "A PEM file with the CAs to trust instead.", "FILE"),
    _option("tls_cert", "", str, "A PEM file with the certificate to show, where the gateway asks for one.", "FILE"),
    _option("tls_key", "", str, "A PEM file with its private key.", "FILE"),
    _option(
        "token_file", "", str, f"A file with the token to show. Without it {TOKEN_VARIABLE} holds the token.", "FILE"
    ),
    _option("plaintext", False, bool, "Allow the token to go to another machine without TLS."),
)


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the cluster is, and what to show it. As text it is what --gateway said.

    Attributes:
        gateway: as --gateway.
        options: `tls`, `token` and `plaintext`, as `TopKClient` takes them.
    """

    gateway: str = GATEWAY_DEFAULT
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, gateway: str, **given: Any) -> Reach:
        """Reads the options.

        Raises:
            SettingError: a certificate without its key.
        """
        # Our messages say what went wrong; what gRPC's core prints beside them is for servers' logs.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        from topk_grpc.rpc.tls import TlsOptions

        ca, cert, key = (given[name] or None for name in ("tls_ca", "tls_cert", "tls_key"))
        token_file = given["token_file"]
        return cls(
            gateway,
            {
                "tls": TlsOptions(ca, cert, key) if ca or cert or key else given["tls"],
                "token": Path(token_file) if token_file else os.environ.get(TOKEN_VARIABLE) or None,
                "plaintext": given["plaintext"],
            },
        )

    def __str__(self) -> str:
        return self.gateway

    @property
    def targets(self) -> str | list[str]:
        """One target, or several."""
        names = [name.strip() for name in self.gateway.split(",") if name.strip()]
        return names if len(names) > 1 else self.gateway

    def client(self, **options: Any) -> TopKClient:
        """A client of the cluster; its other options are the client's own.

        Raises:
            SettingError: as the client's.
        """
        from topk_grpc.client import TopKClient

        return TopKClient(self.targets, **self.options, **options)

    def connection(self) -> Connection:
        """For calls that the client does not have.

        Raises:
            SettingError: as the connection's.
        """
        from topk_grpc.rpc.connection import Connection

        return Connection(self.targets, **self.options)


def with_reach(command: Callable[..., None]) -> Callable[..., None]:
    """Puts the options in the place of a command's parameter `gateway`."""
    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "gateway"]
    parameters = [*(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own), *_OPTIONS]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        reach = Reach.of(**{each.name: values.pop(each.name) for each in _OPTIONS})
        command(**values, gateway=reach)

    wrapped.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def unreachable(gateway: Reach, error: UnavailableError) -> UnavailableError:
    """Says which gateway did not answer, and what to do."""
    text = str(error)
    hint = ""
    if "CERTIFICATE_VERIFY_FAILED" in text:
        hint = ". Its certificate is not one that is trusted here (--tls-ca), or is for another name or time"
    elif "Socket closed" in text or "handshake" in text.lower():
        how = (
            "It may ask for a certificate, or not trust the one shown (--tls-cert, --tls-key)"
            if gateway.options.get("tls")
            else "It may speak TLS (--tls, --tls-ca)"
        )
        hint = f". {how}"
    elif "connect" in text:
        hint = ". Start a cluster with `topk up`, or name its gateway with --gateway"
    return UnavailableError(f"gateway {gateway}: {text}{hint}")
