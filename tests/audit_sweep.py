"""False alarms: audits of steps that are right, over layouts and dtypes. There must be none.

    python -m tests.audit_sweep [AUDITS] [SEED]     # 2,000 audits by default; prints what each layout and dtype had

Two parts take turns. Cases of the fuzzer (DDP, FSDP2, HSDP, TP, ZeRO 0-3; missing and zero gradients, clip,
accumulation, cuts, all rules), and dtypes (of weights, iteration and messages; masters, stochastic rounding; gradients
of low rank, tiny and large) on two ranks.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from muon_dist.audit.auditor import Audit
from muon_dist.audit.chain import Chain
from muon_dist.fuzz.case import Case
from muon_dist.fuzz.draw import draw
from muon_dist.fuzz.model import start
from muon_dist.fuzz.pool import Pool
from muon_dist.fuzz.run import warm
from muon_dist.fuzz.work import hold
from muon_dist.optim import Muon

Lines = list[dict[str, Any]]
STEPS = 5
SHAPES = ((48, 32), (32, 80), (24, 24))
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Dtypes:
    """A combination of dtypes and what gradients are like.

    rank: of the gradients; 0 for full. size: of their elements.
    """

    weight: str = "float32"
    iteration: str = "float32"
    wire: str | None = None
    masters: bool = False
    stochastic: bool = False
    rule: str = "muon"
    rank: int = 0
    size: float = 1.0
    lr: float = 0.02

    def label(self) -> str:
        how = f", {self.rule}"
        how += " masters" if self.masters else " stochastic" if self.stochastic else ""
        return f"weights {self.weight}{how}, iteration {self.iteration}, wire {self.wire or 'as updates'}"


def combinations() -> list[Dtypes]:
    found = []
    kept = [("float32", False, False), ("bfloat16", False, False), ("bfloat16", True, False),
            ("bfloat16", False, True), ("float16", True, False), ("float64", False, False)]  # fmt: skip
    rules = itertools.cycle(("muon", "normuon", "hyperball", "namo", "adamuon", "soap_muon"))
    gradients = itertools.cycle(itertools.product((0, 1, 3), (1.0, 1e-6, 1e3), (0.02, 1e-4)))
    for (weight, masters, stochastic), iteration, wire in itertools.product(kept, _DTYPES, (None, "bfloat16")):
        for _ in range(3):
            found.append(Dtypes(weight, iteration, wire, masters, stochastic, next(rules), *next(gradients)))
    return found


@dataclass
class Recorded:
    """Catches all lines that chains write."""

    lines: Lines = field(default_factory=list)

    def __enter__(self) -> Recorded:
        right = Chain.append

        def append(chain: Chain, record: Any) -> dict[str, Any]:
            self.lines.append(right(chain, record))
            return self.lines[-1]

        self._patch = patch.object(Chain, "append", append)
        self._patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.stop()

    @property
    def audits(self) -> Lines:
        return [line for line in self.lines if line["kind"] == "audit"]


def audited_case(text: str) -> Lines:
    """The audits of a case of the fuzzer, on this rank."""
    case = Case.from_json(text)
    holder = hold(case, case.setup, start(case))
    holder.optimizer.audit = Audit({"every": 1, "matrices": 2})
    with Recorded() as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(case.steps):
            holder.step(step)
    holder.close()
    return found.audits


def audited_dtypes(given: Dtypes) -> Lines:
    """The audits of a combination of dtypes."""
    torch.manual_seed(0)
    dtype = getattr(torch, given.weight)
    parameters = [torch.nn.Parameter((torch.randn(s) * 0.1).to(dtype)) for s in (*SHAPES, (50,), (7, 11))]
    groups = [
        {"params": parameters[:3], "algorithm": "muon", "rule": given.rule},
        {"params": parameters[3:], "algorithm": "adamw"},
    ]
    optimizer = Muon(
        groups, lr=given.lr, ns_dtype=getattr(torch, given.iteration), audit={"every": 1, "matrices": 2},
        wire_dtype=getattr(torch, given.wire) if given.wire else None,
        master_weights=given.masters, stochastic_rounding=given.stochastic,
    )  # fmt: skip
    with Recorded() as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(STEPS):
            for n, p in enumerate(parameters):
                p.grad = (given.size * _gradient(p.shape, given.rank, 31 * step + n)).to(dtype)
            optimizer.step()
    return found.audits


def _gradient(shape: Sequence[int], rank: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    if not rank or len(shape) < 2:
        return torch.randn(*shape, generator=random)
    return torch.randn(shape[0], rank, generator=random) @ torch.randn(rank, shape[1], generator=random)


@dataclass
class Swept:
    """What came out: audits and alarms by label; the largest error as a share of its tolerance."""

    audits: Counter[str] = field(default_factory=Counter)
    alarms: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    share: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, label: str, lines: Lines) -> None:
        self.audits[label] += len(lines)
        self.alarms += [(label, line) for line in lines if line["alarms"]]
        for line in lines:
            for stage, bound in line["tolerance"].items():
                error = line["errors"][stage]
                share = float("inf") if error is None else error / bound
                self.share[label] = max(self.share.get(label, 0.0), share)


def sweep(audits: int, seed: int, world_sizes: Sequence[int] = (1, 2, 3, 4, 6, 8), engines: bool = True) -> Swept:
    """Audit until there are so many. Cases of other world sizes are left out."""
    warm(engines)
    found, pools = Swept(), {}  # type: ignore[var-annotated]

    def run(job: Any, world: int, given: Any) -> Lines | None:
        if world not in pools:
            pools[world] = Pool(world, 120.0)
        answers = pools[world].run(job, given)
        if answers[0].kind == "done":
            return list(answers[0].value)
        if any(a.kind != "refused" for a in answers):
            found.failed.append(f"{given}: {answers[0].value}")
            pools.pop(world).close()
        return None

    mixed, number = combinations(), 0
    while found.audits.total() < audits:
        case = replace(draw(seed, number, engines), resume=None)
        if case.rule == "muon" and number % 2:
            case = replace(case, rule=("adamuon", "soap_muon")[number // 2 % 2])
        if case.setup.world in world_sizes and not case.setup.for_good:  # the ranks stay
            lines = run(audited_case, case.setup.world, case.to_json())
            found.add(f"{case.setup.label()}, {case.rule}", lines or [])
        dtypes = mixed[number * 7 % len(mixed)]
        found.add(dtypes.label(), run(audited_dtypes, 2, dtypes) or [])
        number += 1
    for pool in pools.values():
        pool.close()
    return found


def main() -> int:
    audits = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    found = sweep(audits, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print("| what | audits | largest error / tolerance |\n|---|---|---|")
    for label in sorted(found.audits):
        print(f"| {label} | {found.audits[label]} | {found.share.get(label, 0.0):.3f} |")
    for label, line in found.alarms:
        print(f"ALARM {label}: {line}"[:900])
    for text in found.failed:
        print(f"FAILED {text[:600]}")
    print(f"{found.audits.total()} audits, {len(found.alarms)} alarms, {len(found.failed)} failed")
    return 0 if not found.alarms and not found.failed else 1


if __name__ == "__main__":
    sys.exit(main())
