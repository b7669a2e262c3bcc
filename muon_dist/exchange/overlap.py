"""The order in which the buckets of a step pass through its stages, as pure data."""

from __future__ import annotations

from collections.abc import Iterator

STAGES = ("gather", "stack", "orthogonalize", "scatter", "update")
"""Of one bucket: its momentum is sent to the owners; waited for and stacked; orthogonalized; the updates are sent
back; waited for and applied."""


def pipeline(buckets: int, overlap: bool) -> Iterator[tuple[str, int]]:
    """(stage, bucket) in the order in which every rank takes them.

    Without overlap one bucket after another. With it, bucket i + 1 is on its way to its owners, and bucket i - 1 on
    its way back, while bucket i is orthogonalized; nothing of bucket i - 1 is left when the updates of bucket i are
    sent. The order depends on the number of buckets alone, never on timing, so all ranks issue the same messages in
    the same order, and every number is computed from the same inputs as without overlap.
    """
    if not overlap:
        yield from ((stage, i) for i in range(buckets) for stage in STAGES)
        return
    for i in range(buckets):
        if i == 0:
            yield "gather", 0
        yield "stack", i
        if i + 1 < buckets:
            yield "gather", i + 1
        yield "orthogonalize", i
        if i > 0:
            yield "update", i - 1
        yield "scatter", i
    if buckets:
        yield "update", buckets - 1
