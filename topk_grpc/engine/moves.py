"""What the outcome of a migration does to a shard's state, live and from the log."""

from __future__ import annotations

from topk_grpc.engine.ownership import Held
from topk_grpc.engine.state import ShardState
from topk_grpc.engine.transfer import drop_slots, import_slots, read_image


def settle(state: ShardState, migration_id: int, *, committed: bool) -> Held:
    """Ends a migration: committed, the target counts the image and the source drops the slots; else nothing changes.

    Returns:
        What it was.

    Raises:
        MigrationError: it is not under way here.
    """
    held = state.ownership.settle(migration_id, committed=committed)
    if committed and held.incoming:
        import_slots(state, read_image(held.image))
    elif committed:
        drop_slots(state, held.slots)
    return held
