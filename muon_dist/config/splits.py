"""The blocks of a configuration that say how matrices are cut."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from muon_dist.config.kinds import Block, PositiveInt


class CutConfig(Block):
    """How a parameter is split into matrices: exactly one of heads, sizes and from_model."""

    heads: PositiveInt | None = Field(default=None, description="number of blocks of one size")
    sizes: tuple[PositiveInt, ...] | None = Field(default=None, description="rows of each block")
    axis: Literal["outputs", "inputs"] = Field(
        default="outputs", description="what is cut; the heads of an attention's output projection are its inputs"
    )
    from_model: bool = Field(default=False, description="as the model's attention is made; short: split: heads")

    @property
    def one_way(self) -> bool:
        """Whether exactly one of the three is given."""
        return (self.heads is not None) + bool(self.sizes) + self.from_model == 1


class SplitConfig(CutConfig):
    """Cut the matching Muon parameters: exactly one of heads, sizes and from_model."""

    pattern: str


def _tuples(given: Any) -> Any:
    """With tuples for lists: behind one of our validators pydantic no longer takes the one for the other."""
    if isinstance(given, list):
        return tuple(_tuples(item) for item in given)
    return {key: _tuples(value) for key, value in given.items()} if isinstance(given, dict) else given


def heads_of_entry(given: Any) -> Any:
    """`split: heads` of an entry, in full."""
    return {"from_model": True} if given == "heads" else _tuples(given)


def heads_of_all(given: Any) -> Any:
    """`routing.split: heads`, in full."""
    return ({"pattern": ".*", "from_model": True},) if given == "heads" else _tuples(given)
