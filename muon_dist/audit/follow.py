"""Some elements of the matrix that is audited next, followed from one step to the next."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from muon_dist.layout import view
from muon_dist.optim.runtime import Runtime, Work

_SIDE = 8
"""At most this many rows, and columns, of a matrix on each rank."""


class Follow:
    """Compares momentum and weight at the beginning of a step with what the last step left.

    It reads nothing on the host and sends nothing: `changed` is asked in an audited step only.
    """

    def __init__(self) -> None:
        self._number = -1
        self._left: list[Tensor] | None = None
        self._gaps: list[Tensor] | None = None
        self._resumed = False

    def forget(self) -> None:
        """State was loaded, so the next step begins with other numbers."""
        self._left = self._gaps = None
        self._resumed = False

    def before(self, runtime: Runtime, work: dict[int, Work]) -> None:
        """At the beginning of a step."""
        if self._left is None or self._number < 0:
            return
        now = self._samples(runtime, work)
        if [t.shape for t in now] != [t.shape for t in self._left]:
            return
        kept = [t.to(n.device) for t, n in zip(self._left, now, strict=True)]
        gaps = [(n.float() - k).abs().amax() for n, k in zip(now, kept, strict=True)]
        self._gaps = gaps if self._gaps is None else [g.maximum(h) for g, h in zip(gaps, self._gaps, strict=True)]

    def after(self, runtime: Runtime, work: dict[int, Work], number: int) -> None:
        """At the end of a step. number: the matrix that is audited next."""
        buffer = runtime.plan.layout.matrices[number].buffer
        if buffer not in work:  # a framework steps its groups one by one, or there was no gradient
            if number != self._number:
                self.forget()
                self._number = number
            return
        if number != self._number:
            self._gaps, self._resumed = None, False
        self._number = number
        self._left = [t.detach().float().clone() for t in self._samples(runtime, work)]

    def _samples(self, runtime: Runtime, work: dict[int, Work]) -> list[Tensor]:
        held = runtime.plan.layout.matrices[self._number]
        if held.buffer not in work:
            return []
        found = [v for m, _, v in runtime.momentum_pieces(held.buffer) if m == held.matrix][:1]
        parameter = work[held.buffer].parameter.detach()
        fragments = held.on(runtime.transport.rank)
        if len(fragments) and parameter.is_contiguous() and found:
            found.append(view(parameter, fragments[0].local))
        return [t[:: -(-t.size(0) // _SIDE), :: -(-t.size(1) // _SIDE)] for t in found if t.numel()]

    def changed(self) -> tuple[bool, bool, bool]:
        """Whether momentum and weight were changed between steps, and whether the run was resumed meanwhile."""
        found = [float(g) != 0.0 for g in self._gaps or ()]
        self._gaps = None
        return (found[0] if found else False), (found[1] if len(found) > 1 else False), self._resumed

    def state_dict(self) -> dict[str, Any]:
        """This rank's state for a resumed run."""
        return {"number": self._number, "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Expect the momentum and the weight of the saved run."""
        self._number, left = int(state["number"]), state["left"]
        self._left = None if left is None else [t.clone() for t in left]
        self._gaps, self._resumed = None, True
