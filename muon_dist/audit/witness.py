"""`muon_dist.witness`: follows any optimizer, and reports faults and choices in its steps."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muon_dist.audit.asked import Asked, Wanted, read
from muon_dist.audit.cause import Cause, Difference
from muon_dist.audit.convention import SCALES
from muon_dist.audit.directions import ADAM_BETAS, Facts, Step, judge
from muon_dist.audit.followed import Followed, candidates, digest, draw, source_of
from muon_dist.audit.lengths import Length, Scale, causes_of, find_scale, tells_rate
from muon_dist.audit.memory import BASE, CLIPPED, TWICE, Memory
from muon_dist.audit.record import Finding, Findings, Seen
from muon_dist.audit.sources import Circumstances, Source, size_of_group
from muon_dist.errors import ConfigError, InexactError

logger = logging.getLogger("muon_dist.witness")

RULES = ("muon", "normuon", "adamw")
# Largest number of unexplained steps that are searched for a cause: a search tries a hundred directions.
SEARCHES = 4
_OPTIONS = (
    "lr", "weight_decay", "momentum", "nesterov", "scale", "ns_schedule", "ns_steps", "ns_coefficients", "betas", "eps"
)  # fmt: skip


class Witness:
    """Follows an optimizer; returned by `muon_dist.witness`.

    Attributes:
        followed: names of the currently followed matrices.
        steps: number of optimizer steps seen.
        seen: the last judged steps, one entry per matrix and step.
    """

    def __init__(self, wanted: Wanted, matrices: int | str | Sequence[str], **options: Any) -> None:
        self.wanted = wanted
        self.steps = 0
        self.seen: deque[Seen] = deque(maxlen=10_000)
        self._matrices = matrices
        self._every = int(options["every"])
        self._rotate = options["rotate"]
        self._seed = int(options["seed"])
        self._pieces: Mapping[str, Sequence[int]] = options["pieces"] or {}
        self._raises = options["on_finding"] == "raise"
        self._findings = Findings()
        self._source: Source | None = None
        self._names: list[str] = []
        self._followed: dict[str, Followed] = {}
        self._scales: dict[int, Scale] = {}
        self._saves: deque[dict[str, tuple[Memory, Tensor]]] = deque(maxlen=3)
        self._since = 0

    @property
    def followed(self) -> list[str]:
        return list(self._followed)

    @property
    def findings(self) -> list[Finding]:
        """Faults: differences from what was asked for. Empty if every judged step was right."""
        return self._findings.of("fault")

    @property
    def choices(self) -> list[Finding]:
        """Deliberate differences of the optimizer: coefficients, precision, factor of the shape."""
        return self._findings.of("choice")

    def table(self) -> str:
        """Findings, then choices, as a Markdown table: what, matrices, steps, error, factor, angle."""
        return self._findings.table(self.steps, self.followed, self._precision())

    def check(self) -> None:
        """Raise `InexactError` with all findings; return if there are none."""
        if self.findings:
            raise InexactError("; ".join(f"{f.matrix}: {f.sentence}" for f in self.findings))

    def close(self) -> None:
        """Stop following; findings stay."""
        if self._source is not None:
            self._source.close()

    def state_dict(self) -> dict[str, Any]:
        """The expected momentum of the followed matrices, to be saved with a checkpoint."""
        return {n: {"memory": f.memory.copy().__dict__, "weight": f.after} for n, f in self._followed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the `state_dict` of the run whose optimizer state was loaded."""
        for name, kept in state.items():
            if name in self._followed:
                memory = self._followed[name].memory
                memory.__dict__.update(kept["memory"])
                memory.after_load(None)

    def attach(self, source: Source, model: nn.Module | None) -> None:
        """Begin to follow; called by `witness`."""
        self._source = source
        self._names = sorted(candidates(source, model, self.wanted, self._matrices))
        self._choose()
        source.on_save(self._saved)
        source.listen(self._before, self._after)

    def _choose(self) -> None:
        """Choose the next set of followed matrices."""
        assert self._source is not None
        names = self._names
        if isinstance(self._matrices, int):
            names = draw(names, self._source.matrices, self._matrices, f"{self._seed} {self.steps}")
        self._followed = {
            n: Followed(n, self._source.matrices[n], self._pieces.get(n, ()), self.steps > 0) for n in sorted(names)
        }
        self._since = self.steps
        self._source.follow(list(self._followed))

    def _warm(self, asked: Asked) -> int:
        """Number of steps after which momentum that started later equals the optimizer's closely enough."""
        slowest = max(asked.betas) if self.wanted.rule == "adamw" else asked.momentum
        return math.ceil(math.log(1e-4) / math.log(slowest)) if slowest > 0 else 1

    def _precision(self) -> float:
        return max((s.noise for s in self.seen), default=0.0)

    def _saved(self) -> None:
        self._saves.append({n: (f.memory.copy(), f.after) for n, f in self._followed.items() if f.after is not None})

    def _before(self, names: Sequence[str]) -> None:
        assert self._source is not None
        for f in self._own(names):
            f.gradients = self._source.gradients(f.name)
            f.before = self._source.weight(f.name)
            if f.memory.means[BASE].device != f.before.device:
                f.memory.to(f.before.device)
            if f.after is not None and not torch.equal(f.before, f.after):
                self._jumped(f)

    def _own(self, names: Sequence[str]) -> list[Followed]:
        mine = set(names)
        return [f for n, f in self._followed.items() if n in mine]

    def _jumped(self, f: Followed) -> None:
        """Handle a weight that changed since the last step, by a load or by other code."""
        for save in reversed(self._saves):
            if f.name not in save:
                continue
            memory, weight = save[f.name]
            assert f.before is not None
            if torch.equal(weight, f.before):
                kept, f.memory = f.memory, memory.copy()
                f.memory.after_load(kept)
                f.searches = 0
                return
        f.written = True
        f.memory.after_load(None)
        cause = Cause("written", "the weight changed between two steps: a load, or another writer", "choice")
        change = Difference.between(f.before, f.after)  # type: ignore[arg-type]
        self._note(f.name, cause, change, cause.sentence)

    @torch.no_grad()
    def _after(self, names: Sequence[str]) -> None:
        assert self._source is not None
        said = self._source.circumstances()
        own = self._own(names)
        if own and own[0].name == next(iter(self._followed)):
            self.steps += 1
        judged: list[tuple[Followed, Length]] = []
        for f in own:
            f.after = self._source.weight(f.name)
            found = self._judge(f, said) if said.applied else None
            if found is not None:
                judged.append((f, found))
        self._conclude(judged)
        self._compare_copies(own)
        if self._rotate and self.steps - self._since >= self._rotate:
            self._choose()

    def _judge(self, f: Followed, said: Circumstances) -> Length | None:
        """Judge the step of one matrix; return the length of its update if the step could be explained."""
        assert self._source is not None and f.before is not None and f.after is not None
        asked = read(self._source.options(f.name), self.wanted, f.pieces)
        if self._rotate and self._rotate <= self._warm(asked):
            raise ConfigError(f"rotate={self._rotate}: momentum is known after {self._warm(asked)} steps: use more")
        change = f.after - f.before
        if f.gradients is None:
            if bool(change.any()):
                cause = Cause("no_gradient", "the weight moves without a gradient")
                self._note(f.name, cause, Difference.between(change, torch.zeros_like(change)), cause.sentence)
            return None
        labels = f.gradients
        if not bool(torch.isfinite(labels[BASE]).all()):
            cause = Cause("not_finite", "a gradient that is not finite was stepped")
            self._note(f.name, cause, Difference.between(labels[BASE], change), cause.sentence)
            return None
        if said.scale != 1.0:
            labels = {**labels, TWICE: labels[BASE] / said.scale}
        if said.clip != 1.0:
            labels = {**labels, CLIPPED: labels[BASE] * said.clip}
            if self.wanted.rule == "adamw":
                labels[BASE] = labels[CLIPPED]
        f.memory.take(labels, asked.momentum, tuple({asked.betas, *ADAM_BETAS}))
        if self.steps % self._every or (f.late and f.memory.steps <= self._warm(asked)) or not f.memory.moved:
            return None
        length = self._look(f, asked, change, said)
        if self.wanted.rule == "normuon" and f.habit is not None:
            f.memory.keep_rows(
                f.habit.iteration(f.memory.look_ahead(BASE, asked.momentum, asked.nesterov is not False))
            )
        return length

    def _look(self, f: Followed, asked: Asked, change: Tensor, said: Circumstances) -> Length | None:
        assert self._source is not None and f.before is not None and f.after is not None
        nothing = Difference(1.0, 0.0, math.pi / 2)
        if not bool(change.any()):
            if asked.lr and bool(f.memory.gradients[BASE].any()) and asked.lr > 1e-12:
                cause = Cause("no_step", "the step left this matrix as it was")
                self._note(f.name, cause, nothing, cause.sentence)
            return None
        if asked.lr == 0:
            cause = Cause("rate", "the matrix moves, and a rate of 0 was asked")
            self._note(f.name, cause, Difference(math.inf, math.inf, 0.0), cause.sentence)
            return None
        facts = Facts(
            self._source.shards(f.name), said.factors, self._source.weight_eps(f.name), self._source.gradient_eps
        )
        found = judge(Step(f.before, f.after, f.memory, asked, facts), f.habit, search=f.searches < SEARCHES)
        if not found.known and f.written:
            # The loaded momentum is unknown: follow it from now on, and judge again when it is known.
            cause = Cause("momentum_unknown", "momentum is unknown after the weight was written", "choice")
            self._note(f.name, cause, found.difference, cause.sentence)
            f.memory, f.late, f.written = Memory(f.shape, f.before.device), True, False
            return None
        f.written = False
        f.searches += not found.known
        f.habit = found.habit
        return Length(f.name, f.shape, asked, found, said.factors, f.memory.zeros, facts.weight_eps)

    def _conclude(self, judged: Sequence[tuple[Followed, Length]]) -> None:
        """Record the causes shown by the directions and lengths of one step."""
        lengths = [length for _, length in judged]
        if not lengths:
            return
        scale = self._scales[0] = find_scale(lengths, self._scales.get(0))
        factor = SCALES[scale.name]
        ratios = {e.name: e.ratio / factor(*e.shape) for e in lengths if tells_rate(e.judgement)}
        for f, e in judged:
            found = e.judgement
            difference = found.difference.against(factor(*e.shape))
            causes = list(found.causes)
            causes += causes_of(e, scale, [r for n, r in ratios.items() if n != e.name])
            decay = f.decay.cause(e, scale)
            if decay is not None:
                causes.append(decay)
            if not found.known:
                causes.append(Cause("unknown", "no known cause"))
            if any(c.name == "rests" for c in causes):
                difference = difference.against(e.asked.momentum**e.zeros)
            self.seen.append(Seen(self.steps, e.name, difference, found.noise, tuple(c.name for c in causes)))
            if scale.settled and e.asked.scale is None and self.wanted.rule != "adamw" and scale.name != "none":
                causes.append(Cause("scale", f"factor of the shape: {scale.name}", "choice"))
            for cause in causes:
                self._note(e.name, cause, difference)

    def _compare_copies(self, own: Sequence[Followed]) -> None:
        """Check that all ranks of the source's group hold equal weights and used equal gradients."""
        assert self._source is not None
        ranks = size_of_group(self._source.group)
        if ranks < 2 or not own or self.steps % self._every:
            return
        rows = []
        for f in own:
            gradient = f.gradients[BASE] if f.gradients is not None else None
            rows.append([digest(f.after), 0 if gradient is None else digest(gradient)])
        mine = torch.tensor(rows, dtype=torch.int64)
        if dist.get_backend(self._source.group) == "nccl":
            mine = mine.cuda()
        parts = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(parts, mine, group=self._source.group)
        same = torch.stack([(part == mine).int() for part in parts]).amin(dim=0)
        dist.all_reduce(same, op=dist.ReduceOp.MIN, group=self._source.group)
        for f, (weights, gradients) in zip(own, same.tolist(), strict=True):
            for equal, name, what in (
                (weights, "copies", "rank copies differ: the ranks hold different weights after the step"),
                (gradients, "gradient_copies", "the ranks step with different gradients: they were not averaged"),
            ):
                if not equal:
                    self._note(f.name, Cause(name, what), Difference(math.nan, math.nan, math.nan), what)

    def _note(self, matrix: str, cause: Cause, difference: Difference, sentence: str | None = None) -> None:
        new = self._findings.add(self.steps, matrix, cause, difference, sentence)
        if new is None or cause.kind == "choice":
            return
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            logger.warning("step %d, %s: %s", self.steps, matrix, new.sentence)
        if self._raises:
            raise InexactError(f"step {self.steps}, {matrix}: {new.sentence}")


def checked(
    rule: str, matrices: int | str | Sequence[str], every: int, on_finding: str, asked: Mapping[str, Any]
) -> int | str | Sequence[str]:
    """`matrices`, with a single pattern as a list. Raises ConfigError for invalid arguments of `witness`."""
    if rule not in RULES:
        raise ConfigError(f"rule={rule!r}: use {', '.join(RULES)}")
    unknown = set(asked) - set(_OPTIONS)
    if unknown:
        raise ConfigError(f"witness does not know {', '.join(sorted(unknown))}: use {', '.join(_OPTIONS)}")
    if on_finding not in ("warn", "raise"):
        raise ConfigError(f"on_finding={on_finding!r}: use warn or raise")
    if isinstance(matrices, str) and matrices != "all":
        matrices = [matrices]
    if every < 1 or (isinstance(matrices, int) and matrices < 1):
        raise ConfigError(f"every={every}, matrices={matrices}: both must be at least 1")
    return matrices


def witness(
    optimizer: Any,
    *,
    model: nn.Module | None = None,
    rule: str = "muon",
    matrices: int | str | Sequence[str] = 4,
    every: int = 1,
    rotate: int | None = None,
    seed: int = 0,
    clip: float | None = None,
    pieces: Mapping[str, Sequence[int]] | None = None,
    on_finding: str = "warn",
    **asked: Any,
) -> Witness:
    """Follow an optimizer from now on and compare its steps with the plain rule.

    The optimizer does not change. Hooks around its step gather whole weights and gradients of a few matrices, and the
    witness recomputes the step with its own fp64 momentum. Call it on every rank with the same arguments, before the
    first step.

    Args:
        optimizer: a torch optimizer or a list of them (plain loops, DDP, FSDP2, HSDP), a DeepSpeed engine, or a
            Hugging Face Trainer, which is followed from `on_train_begin` on.
        model: for names, and for the hidden matrices that Muon should train even if the groups do not say so.
        rule: "muon", "normuon" or "adamw".
        matrices: number of followed matrices, "all", or regular expressions for names. Each needs two fp64 copies of
            weight and momentum.
        every: judge one of this many steps; gradients are recorded at every step.
        rotate: follow other matrices after this many steps. A new matrix is judged after log(1e-4) / log(momentum)
            steps, when its momentum is known.
        seed: seed of the choice of matrices.
        clip: bound of the global gradient norm, if the framework does not provide it.
        pieces: name -> numbers of rows of blocks that should be orthogonalized separately (heads, fused projections).
        on_finding: "warn" (logger `muon_dist.witness`) or "raise" (`InexactError`, on all ranks).
        asked: options that override the parameter groups: lr, weight_decay, momentum, nesterov, scale, ns_schedule,
            ns_steps, ns_coefficients, betas, eps.

    Returns:
        A `Witness`: `.findings`, `.choices`, `.table()`, `.check()`, `.close()`.

    Raises:
        ConfigError: an unknown argument, or no matrix to follow.
        FrameworkError: the parameters are stored in a form that cannot be read whole.
    """
    matrices = checked(rule, matrices, every, on_finding, asked)
    made = Witness(
        Wanted(rule, asked), matrices, every=every, rotate=rotate, seed=seed, pieces=pieces, on_finding=on_finding
    )
    if hasattr(optimizer, "add_callback"):
        from muon_dist.audit.follow_trainer import follow_trainer

        follow_trainer(optimizer, lambda found, of: made.attach(source_of(found, of, clip), of))
        return made
    engine_model = getattr(optimizer, "module", None) if model is None else model
    made.attach(source_of(optimizer, engine_model, clip), engine_model)
    return made
