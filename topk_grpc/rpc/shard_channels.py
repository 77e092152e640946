"""How gateways, shards and controllers reach shards: the credentials of the connection, and those of each call.

With `--tls-ca` connections are TLS in both directions: the shard has to show a certificate of the cluster's CA, and so
does whoever calls it. Each call carries the cluster's secret besides, so that a shard knows its own cluster in
plaintext too; for that reason nothing is sent in plaintext to another machine, unless `--plaintext` allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from topk_grpc.config import GatewaySettings, ServerSettings, is_loopback
from topk_grpc.errors import SettingError
from topk_grpc.rpc.access import CLUSTER_SECRET_KEY
from topk_grpc.rpc.channels import open_channel
from topk_grpc.rpc.tls import PemFiles, channel_credentials


class ShardChannels:
    """Opens channels to the shards of one cluster.

    Args:
        settings: of whoever calls. A gateway may show its shards another certificate than its clients.
        cluster_id: whose shards they are.
        secret: the cluster's.

    Raises:
        SettingError: a file of a certificate or key cannot be used.
    """

    def __init__(self, settings: ServerSettings, cluster_id: str, secret: str = "") -> None:
        self._plaintext = settings.plaintext
        self._cluster_id = cluster_id
        self._secret = secret
        self._files: PemFiles | None = None
        if settings.tls_ca:
            cert, key = settings.tls_cert, settings.tls_key
            if isinstance(settings, GatewaySettings) and settings.shard_cert:
                cert, key = settings.shard_cert, settings.shard_key
            self._files = PemFiles(cert, key, settings.tls_ca)

    @property
    def generation(self) -> int:
        """Rises when the certificates have changed: a channel opened before goes on with the old ones."""
        if self._files is None:
            return 0
        self._files.refresh()
        return self._files.generation

    def metadata(self, shard_id: str) -> tuple[tuple[str, str], ...]:
        """What each call carries."""
        meant = (("topk-cluster-id", self._cluster_id), ("topk-shard-id", shard_id))
        return (*meant, (CLUSTER_SECRET_KEY, self._secret)) if self._secret else meant

    def open(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        """Opens a channel, with the certificates as they are now.

        Raises:
            SettingError: it would be plaintext to another machine, or the address is none.
        """
        if self._files is None:
            if not (self._plaintext or is_loopback(address.rpartition(":")[0])):
                raise SettingError(
                    f"the shard at {address} is on another machine, and would be sent the cluster's secret in"
                    " plaintext: give --tls-ca, or say --plaintext where the network keeps others out"
                )
            return open_channel(address, options=options)
        self._files.refresh()
        return open_channel(address, options=options, credentials=channel_credentials(self._files.pems))
