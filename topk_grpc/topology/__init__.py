"""Where the cluster's topology is kept: read, watched, and replaced by one writer at a time."""

from topk_grpc.topology.store import TopologyStore, open_store

__all__ = ["TopologyStore", "open_store"]
