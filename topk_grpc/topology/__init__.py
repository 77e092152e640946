"""Where the cluster's topology is kept: read, watched, and replaced by one writer at a time."""

from topk_grpc.topology.store import Leadership, StoreAccess, TopologyStore, open_store

__all__ = ["Leadership", "StoreAccess", "TopologyStore", "open_store"]
