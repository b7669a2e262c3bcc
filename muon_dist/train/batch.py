"""The same samples in every optimizer step for any number of processes."""

from __future__ import annotations

from muon_dist.errors import ConfigError


def share_batch(global_batch_size: int, most_at_once: int, world_size: int) -> tuple[int, int]:
    """(samples per process in a micro-batch, micro-batches per optimizer step).

    Their product times `world_size` is exactly `global_batch_size`, so the loss curve stays the same if the number of
    processes changes. The micro-batch is the largest possible one of at most `most_at_once` samples.

    Raises:
        ConfigError: `world_size` does not divide `global_batch_size`.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        possible = [n for n in range(1, min(global_batch_size, 4 * world_size) + 1) if global_batch_size % n == 0]
        raise ConfigError(
            f"data.global_batch_size: {global_batch_size} samples cannot be shared evenly by {world_size} "
            f"processes; possible numbers are {', '.join(map(str, possible))}. Choose a multiple of {world_size}, and "
            "of every number of processes on which the run may continue"
        )
    micro = next(n for n in range(min(most_at_once, share), 0, -1) if share % n == 0)
    return micro, share // micro
