"""Moving slots between shards while the cluster serves."""
