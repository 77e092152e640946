"""Each entry's last session, carried forward play by play.

Plays mostly come in the order of their times, or a little late: they begin a session or prolong the last one at either
end, which is a matter of a few comparisons. What else may happen (a play that may join two sessions or touch one that
nobody kept, plays taken back) is left to the caller, who looks at the cells.
"""

from __future__ import annotations

import cython


def carry_forward(
    starts: cython.longlong[::1],
    lasts: cython.longlong[::1],
    plays: cython.longlong[::1],
    priors: cython.longlong[::1],
    entries: cython.const[cython.int][::1],
    buckets: cython.const[cython.longlong][::1],
    counts: cython.const[cython.longlong][::1],
    finest: cython.longlong,
    settled: cython.longlong,
    low: cython.longlong,
    end: cython.longlong,
    gap: cython.longlong,
    changed: cython.int[::1],
    deltas: cython.longlong[::1],
    unclear: cython.int[::1],
    results: cython.longlong[::1],
    rows: cython.Py_ssize_t,
) -> None:
    """Takes plays into the sessions of their entries.

    Args:
        starts, lasts, plays: int64[entries], each entry's last session before `end`: first bucket, last bucket and
            plays; no plays: it has none that ended at `settled` or later.
        priors: int64[entries]: no play of the entry lies between this bucket and its session; may be too late.
        entries, buckets, counts: of each play.
        finest: plays before this bucket join no session.
        settled: see `plays`.
        low: a session is open if its last bucket is this one or a later one.
        end: plays in this bucket or after it are left for later.
        gap: the largest distance of neighbouring buckets in a session.
        changed, deltas: int32 and int64[rows], written: entries, and how their plays in an open session changed.
        unclear: int32[rows], written: entries whose session has to be found from the cells.
        results: int64[2], written: how many changed, how many are unclear.
        rows: plays.
    """
    if not cython.compiled:
        starts, lasts, plays = memoryview(starts), memoryview(lasts), memoryview(plays)
        priors = memoryview(priors)
        entries, buckets, counts = memoryview(entries), memoryview(buckets), memoryview(counts)
        changed, deltas = memoryview(changed), memoryview(deltas)
        unclear, results = memoryview(unclear), memoryview(results)
    i: cython.Py_ssize_t
    entry: cython.Py_ssize_t
    bucket: cython.longlong
    before: cython.longlong
    after: cython.longlong
    out: cython.Py_ssize_t = 0
    left: cython.Py_ssize_t = 0
    with cython.nogil:
        for i in range(rows):
            bucket = buckets[i]
            if bucket < finest or bucket >= end:
                continue
            entry = entries[i]
            before = plays[entry] if lasts[entry] >= low else 0
            if counts[i] > 0 and plays[entry] > 0 and starts[entry] <= bucket <= lasts[entry] + gap:
                plays[entry] += counts[i]
                if bucket > lasts[entry]:
                    lasts[entry] = bucket
            elif counts[i] > 0 and ((bucket > lasts[entry] + gap) if plays[entry] > 0 else (bucket - gap >= settled)):
                priors[entry] = lasts[entry] if plays[entry] > 0 else settled - 1
                starts[entry] = bucket
                lasts[entry] = bucket
                plays[entry] = counts[i]
            elif (bucket < starts[entry] - gap) if plays[entry] > 0 else (bucket < settled):
                if bucket > priors[entry]:
                    priors[entry] = bucket
                continue  # of an earlier session, which touches none that is kept
            elif (
                counts[i] > 0
                and plays[entry] > 0
                and bucket < starts[entry]
                and bucket - gap > priors[entry]
                and bucket - gap >= finest
            ):
                starts[entry] = bucket
                plays[entry] += counts[i]
            else:
                unclear[left] = cython.cast(cython.int, entry)
                left += 1
                continue
            after = plays[entry] if lasts[entry] >= low else 0
            if after != before:
                changed[out] = cython.cast(cython.int, entry)
                deltas[out] = after - before
                out += 1
    results[0] = out
    results[1] = left
