"""What a shard counts and how it answers: windows, cells, boards, admission, apply, query.

Synchronous, without I/O and without a clock: time comes in as an argument, bytes come in from the log, arrays go out to
the snapshot. One writer calls it; nothing here locks.
"""
