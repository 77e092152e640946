"""A stateless gateway: splits batches over the shards, and merges the shards' answers."""
