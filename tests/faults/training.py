"""A small training run that can be killed anywhere: DDP, Muon and AdamW groups, dropout, schedule, checkpoints.

It contains everything that a run must keep, and records everything that a test must compare.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from muon_dist.adapters.module_state import holding
from muon_dist.checkpoint import Checkpoint, Contents, RandomState, Ranks, Saver, load, newest_good, open_checkpoint
from muon_dist.errors import Stopped
from muon_dist.guards.spikes import SpikeDetector
from muon_dist.guards.vote import Ballot, StepVote, StragglerReport
from muon_dist.guards.watchdog import Watchdog, default_store
from muon_dist.optim import Muon, param_groups
from muon_dist.train.signals import StopSignals
from tests.faults.injector import Fault, Injector

VOCABULARY, WIDTH, SAMPLES = 32, 16, 4
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """Embedding, two blocks, dropout, a head: next token from this token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.dropout(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch(step: int, rank: int) -> torch.Tensor:
    """The samples of a rank in a step."""
    generator = torch.Generator().manual_seed(7919 * step + rank)
    return torch.randint(0, VOCABULARY, (SAMPLES, 9), generator=generator)


@dataclass(frozen=True)
class Plan:
    """How a life of the run goes.

    Attributes:
        folder: of checkpoints and records.
        steps: of the whole run.
        save_every: steps between two commits.
        start: step of the commit from which to continue; None: the newest good one.
        watchdog: seconds, 0 for none.
        spike_at: steps in which rank 1 sees a loss ten times as large; with a window of 8.
        stragglers: collect the report's messages.
    """

    folder: str
    steps: int
    save_every: int = 2
    start: int | None = None
    watchdog: float = 0.0
    spike_at: tuple[int, ...] = ()
    stragglers: bool = False


class Life:
    """One process of the run, which continues where the last one ended."""

    def __init__(self, plan: Plan, fault: Fault | None) -> None:
        self.plan = plan
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.root = Path(plan.folder)
        # else DDP rebuilds its buckets after its first step, which changes the order of summation on resume
        self.model = nn.parallel.DistributedDataParallel(Tiny(), find_unused_parameters=True)
        torch.manual_seed(100 + self.rank)
        self.optimizer = Muon(param_groups(self.model.module, lr=0.02, adamw_lr=0.01), bucket_mb=0.001)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1.0 / (1 + 0.05 * n))
        self.random = RandomState()
        self.ranks = Ranks(dist.group.WORLD)
        self.saver = Saver(self.root / "checkpoints", self.ranks)
        self.vote = StepVote(dist.group.WORLD, CPU)
        self.report = StragglerReport(self.world)
        self.detector = SpikeDetector(window=8, sigmas=4.0)
        self.signals = StopSignals()
        self.step, self.said, self.vetoed = 0, [], []
        self.ballot: Ballot | None = None
        self.optimizer.guard.veto = self._veto
        self.injector = Injector(fault, self.rank, self.root / "strike.json")
        self.injector.watch(self.optimizer.progress)

    # ---- what is kept

    def digest(self) -> str:
        """Of all parameters on this rank."""
        total = hashlib.sha256()
        for p in self.model.parameters():
            total.update(p.detach().numpy().tobytes())
        return total.hexdigest()

    def write(self, kind: str, **values: Any) -> None:
        """A line of the record, by the first rank, at once."""
        if self.rank == 0:
            with (self.root / "record.jsonl").open("a") as file:
                file.write(json.dumps({"kind": kind, "step": self.step, **values}) + "\n")

    def save(self) -> None:
        held = holding(self.model, self.optimizer, self.world)
        self.optimizer.progress.enter("save")
        state = {"scheduler": self.scheduler.state_dict(), "detector": self.detector.state_dict()}
        contents = Contents(self.step, held.layout)
        self.saver.save(held.pieces, contents, state=state, rank_state={"random": self.random.state_dict()})
        self.write("commit", digest=self.digest())

    def resume(self) -> None:
        """From the newest good commit, if there is one."""
        root, found = self.root / "checkpoints", None
        if self.plan.start is not None:
            found = open_checkpoint(root / f"checkpoint-{self.plan.start}", self.ranks)
        elif root.is_dir():
            found = newest_good(root, self.ranks)
        if found is None:
            return
        self._load(found)
        self.write("resume", digest=self.digest())

    def _load(self, found: Checkpoint) -> None:
        load(found, holding(self.model, self.optimizer, self.world, source=found), self.ranks)
        state, own = found.state(), found.rank_state(self.rank)
        assert own is not None
        self.scheduler.load_state_dict(state["scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        self.detector.load_state_dict(state["detector"])
        self.random.load_state_dict(own["random"])
        self.step = found.step
        self.optimizer.progress.step = found.step

    # ---- the loop

    def _veto(self) -> bool:
        self.ballot = self.vote.result()
        if self.ballot is None or not self.plan.spike_at:
            return False
        spiked = self.detector.is_spike(self.ballot.loss)
        if spiked:
            self.vetoed.append(self.step)
        return spiked

    def one_step(self) -> None:
        progress = self.optimizer.progress
        self.vote.work.start()
        progress.enter("data")
        tokens = batch(self.step, self.rank)
        progress.enter("forward")
        loss = self.model(tokens)
        if self.step in self.plan.spike_at and self.rank == 1:
            loss = 10 * loss
        self.vote.cast(loss, self.signals.requested)
        progress.enter("backward")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        assert self.ballot is not None
        self.write("loss", loss=self.ballot.loss.hex())
        if self.plan.stragglers and (message := self.report.add(self.ballot.busy)):
            self.said.append((self.step, message))
        self.step += 1

    def run(self) -> dict[str, Any]:
        """To the end; raises Stopped after a signal, once all ranks have committed."""
        self.resume()
        self.injector.watch_saves()
        with self.signals:
            while self.step < self.plan.steps:
                self.one_step()
                stop = self.ballot.stop if self.ballot is not None else {}
                if stop or self.step % self.plan.save_every == 0:
                    self.save()
                if stop:
                    raise Stopped(f"ranks {sorted(stop)} were asked to stop; committed step {self.step}")
        return {"digest": self.digest(), "said": self.said, "vetoed": self.vetoed}


def live(plan: Plan, fault: Fault | None = None) -> dict[str, Any]:
    """One life on this rank."""
    life = Life(plan, fault)
    if not plan.watchdog:
        return life.run()
    with Watchdog(
        life.optimizer.progress, default_store(), life.rank, life.world, timeout=plan.watchdog, interval=0.1
    ):
        return life.run()


def record(folder: Path) -> list[dict[str, Any]]:
    """The lines that the first rank wrote, over all lives; a line cut off by a kill is left out."""
    lines = []
    path = folder / "record.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def operations(plan: Plan) -> list[str]:
    """The operations that a rank passes in one step, in order; run on forked ranks."""
    life = Life(plan, None)
    life.one_step()
    seen: list[str] = []
    life.optimizer.progress.listeners.append(lambda p: seen.append(p.operation))
    life.one_step()
    return list(dict.fromkeys(seen))
