"""Which slot a song belongs to, and which shard a slot."""

from topk_grpc.ring.plan import plan_owners
from topk_grpc.ring.slots import slot_of

__all__ = ["plan_owners", "slot_of"]
