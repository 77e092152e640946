"""gRPC's edges: errors and statuses, servers, channels, messages and values, log lines."""
