"""The client: records plays exactly once, and asks what is played most.

blocking → aio → recorder → delivery → outbox, each free of what stands left of it: threads, the public face, plays and
batches, streams and time, order and bounds.
"""

from topk_grpc.client.aio import TopKClient
from topk_grpc.client.blocking import BlockingTopKClient
from topk_grpc.client.stats import ClientStats
from topk_grpc.rpc.tls import TlsOptions

__all__ = ["BlockingTopKClient", "ClientStats", "TlsOptions", "TopKClient"]
