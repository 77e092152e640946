"""topk-grpc."""
