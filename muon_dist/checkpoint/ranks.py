"""The ranks of a checkpoint."""

from __future__ import annotations

from muon_dist import ranks
from muon_dist.errors import CheckpointError


class Ranks(ranks.Ranks):
    """Ranks that save and load together: a failure on one rank is a CheckpointError on all.

    A save in the background and a load must not use one instance at the same time.
    """

    failure = CheckpointError
