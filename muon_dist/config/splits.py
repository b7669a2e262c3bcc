"""The blocks of a configuration that say how parameters are split into matrices."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from muon_dist.config.kinds import Block, PositiveInt


class CutConfig(Block):
    """How a parameter is split into matrices: exactly one of heads, sizes and from_model."""

    heads: PositiveInt | None = Field(default=None, description="number of blocks of equal size")
    sizes: tuple[PositiveInt, ...] | None = Field(default=None, description="rows of each block")
    axis: Literal["outputs", "inputs"] = Field(
        default="outputs",
        description="axis that is split; the heads of an attention's output projection are its inputs",
    )
    from_model: bool = Field(
        default=False, description="split by the heads of the model's attention; short form: split: heads"
    )

    @property
    def one_way(self) -> bool:
        """Whether exactly one of the three is given."""
        return (self.heads is not None) + bool(self.sizes) + self.from_model == 1


class SplitConfig(CutConfig):
    """Split the matching Muon parameters: exactly one of heads, sizes and from_model."""

    pattern: str


def _tuples(given: Any) -> Any:
    """Lists as tuples: after a validator of our own, pydantic no longer accepts a list for a tuple."""
    if isinstance(given, list):
        return tuple(_tuples(item) for item in given)
    return {key: _tuples(value) for key, value in given.items()} if isinstance(given, dict) else given


def heads_of_entry(given: Any) -> Any:
    """The long form of `split: heads` in an entry of groups."""
    return {"from_model": True} if given == "heads" else _tuples(given)


def heads_of_all(given: Any) -> Any:
    """The long form of `routing.split: heads`."""
    return ({"pattern": ".*", "from_model": True},) if given == "heads" else _tuples(given)
