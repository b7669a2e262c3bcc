"""The check of every refusal of bad data."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from muon_dist.errors import DataError


@contextlib.contextmanager
def refused(*parts: object) -> Iterator[None]:
    """The block ends in a DataError (exit code 3) whose message holds every part, literally."""
    with pytest.raises(DataError) as caught:
        yield
    assert caught.value.exit_code == 3
    for part in parts:
        assert re.search(re.escape(str(part)), str(caught.value)), f"{part!r} is not in {str(caught.value)!r}"
