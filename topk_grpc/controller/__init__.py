"""The role that sees shards come and go, and has slots moved."""
