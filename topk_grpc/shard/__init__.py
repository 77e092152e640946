"""A stateful shard: one writer, a log, snapshots, and the answers for its slots."""
