"""Which slot a play belongs to, and which shard a slot."""

from topk_grpc.ring.partitioners import PARTITIONERS, Partitioner, partitioner_of
from topk_grpc.ring.plan import plan_owners
from topk_grpc.ring.slots import slot_of

__all__ = ["PARTITIONERS", "Partitioner", "partitioner_of", "plan_owners", "slot_of"]
