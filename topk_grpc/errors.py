"""Every exception this package raises.

TopKError
├── InvalidArgumentError        the caller's request is wrong; trying again does not help
│   ├── WindowError             a window that does not parse, or makes no sense
│   ├── OutOfRangeError         a window that the grain kept for its time cannot cut exactly
│   ├── SettingError            a setting outside its range, or two that contradict each other
│   └── InputError              a file to ingest that cannot be read as mapped
├── UnauthenticatedError        who calls is not known; only other credentials help
│   ├── TokenMissingError       the call carries no token
│   ├── TokenUnknownError       the token is none of those that the gateway knows
│   ├── TokenExpiredError       the token's time is over
│   └── ForeignCallerError      the call does not carry the secret of the cluster
├── PermissionDeniedError       who calls is known, and may not do that
├── UnsupportedError            what a cluster with this partitioner does not do; only another cluster helps
├── DuplicateBatchError         the first send of a batch was answered `duplicate`: two processes share a producer id
├── ProducerExpiredError        the producer was forgotten and the batch is older than that
├── RejectedPlaysError          plays of acknowledged batches that did not count, and nobody listens for them
├── UnavailableError            a server cannot answer now; trying again helps
│   ├── DeadlineError           nothing was heard within the time allowed
│   └── NotReadyError           the server recovers, or drains
├── ResourceExhaustedError      a bounded queue, memory budget or disk is full; trying again may help later
│   └── RateLimitedError        more plays a second than the producer or the token may send
├── WrongServerError            a server answered that belongs to another shard or cluster
├── MigrationError              a step of a migration that its state does not allow
├── AddressInUseError           the port to listen on is taken
├── ProcessFailedError          a process started by `topk up` died before it was ready
├── TopologyError               the topology store holds nothing, or nothing that fits
│   └── TopologyConflictError   another writer changed the topology first
├── StaleKernelError            a compiled kernel stands beside another source than it was compiled from
└── StorageError                the data directory
    ├── DirectoryInUseError     another process holds it
    ├── ForeignDirectoryError   it belongs to another shard or cluster, or was replaced by an empty one
    ├── VersionError            it was written by a newer release
    ├── CorruptError            bytes that must be whole are damaged; nothing was changed
    ├── DiskFullError           no room for the next group; nothing was written
    └── WriteFailedError        a write or fdatasync failed: what is on disk is unknown, the process must end

Each message says what is wrong, where, and what to do. How they become gRPC statuses stands in rpc/status.py.
"""

from __future__ import annotations


class TopKError(Exception):
    """The root: catch it to catch everything this package raises."""


class InvalidArgumentError(TopKError, ValueError):
    """The caller's request is wrong; trying again does not help."""


class WindowError(InvalidArgumentError):
    """A window that does not parse, or makes no sense."""


class OutOfRangeError(InvalidArgumentError):
    """A window that no retained tier can cut exactly.

    Attributes:
        start_ms, end_ms: the nearest bounds around it that can be cut: a range window of these is answered.
    """

    def __init__(self, message: str, start_ms: int = 0, end_ms: int = 0) -> None:
        super().__init__(message)
        self.start_ms = start_ms
        self.end_ms = end_ms


class SettingError(InvalidArgumentError):
    """A setting outside its range, or two settings that contradict each other."""


class InputError(InvalidArgumentError):
    """A file to ingest that cannot be read as mapped."""


class UnauthenticatedError(TopKError):
    """Who calls is not known: the same call with the same credentials cannot succeed."""


class TokenMissingError(UnauthenticatedError):
    """The call carries no token."""


class TokenUnknownError(UnauthenticatedError):
    """The token is none of those that the gateway knows."""


class TokenExpiredError(UnauthenticatedError):
    """The token's time is over."""


class ForeignCallerError(UnauthenticatedError):
    """The call does not carry the secret of the cluster: shards answer nobody else."""


class PermissionDeniedError(TopKError):
    """Who calls is known, and may not do that."""


class UnsupportedError(TopKError):
    """What a cluster with this partitioner does not do: no other call to it helps."""


class DuplicateBatchError(TopKError):
    """The first send of a batch was answered `duplicate`: two processes share one producer id."""


class ProducerExpiredError(TopKError):
    """The producer was forgotten after its time to live, and the batch is older than that."""


class RejectedPlaysError(TopKError):
    """Plays of acknowledged batches that did not count, and nobody listens for them.

    Attributes:
        rejected: what the cluster said of each, a `model.Rejected`; at most the first 1,000.
        count: how many there were.
    """

    def __init__(self, message: str, rejected: tuple[object, ...] = (), count: int = 0) -> None:
        super().__init__(message)
        self.rejected = rejected
        self.count = count


class UnavailableError(TopKError):
    """A server cannot answer now; trying again helps."""


class DeadlineError(UnavailableError):
    """Nothing was heard within the time allowed."""


class NotReadyError(UnavailableError):
    """The server recovers or drains."""


class ResourceExhaustedError(TopKError):
    """A bounded queue, memory budget or disk is full; trying again may help later."""


class RateLimitedError(ResourceExhaustedError):
    """More plays a second than the producer or the token may send.

    Attributes:
        retry_after_ms: when there is room again.
    """

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class WrongServerError(TopKError):
    """A server answered that belongs to another shard or another cluster."""


class MigrationError(TopKError):
    """A step of a migration that its state does not allow: read the topology, and decide again."""


class AddressInUseError(TopKError):
    """The port to listen on is taken."""


class ProcessFailedError(TopKError):
    """A process started by `topk up` died before it was ready."""


class TopologyError(TopKError):
    """The topology store holds nothing, or nothing that fits."""


class TopologyConflictError(TopologyError):
    """Another writer changed the topology first; read it again."""


class StaleKernelError(TopKError, ImportError):
    """A compiled kernel stands beside another source than it was compiled from."""


class StorageError(TopKError):
    """The data directory cannot be used as asked."""


class DirectoryInUseError(StorageError):
    """Another process holds the data directory."""


class ForeignDirectoryError(StorageError):
    """The data directory belongs to another shard or cluster, or was replaced by an empty one."""


class VersionError(StorageError):
    """The data directory was written by a newer release."""


class CorruptError(StorageError):
    """Bytes that must be whole are damaged; nothing was changed.

    Attributes:
        path: the damaged file.
        offset: where in it, in bytes; None where the file as a whole is meant.
    """

    def __init__(self, message: str, path: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset


class DiskFullError(StorageError, ResourceExhaustedError):
    """No room for the next group; nothing was written."""


class WriteFailedError(StorageError):
    """A write or fdatasync failed: what is on disk is unknown, and the process must end."""
