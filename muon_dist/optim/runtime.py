"""Runs a plan: momentum on the sources, gather to owners, orthogonalize, scatter, update on all holders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muon_dist.checkpoint.piece import clean_name
from muon_dist.exchange.readers import Listing, Reader, parts_on
from muon_dist.exchange.schedule import bucket_elements
from muon_dist.exchange.transport import Transport
from muon_dist.layout import Fragment, Matrix
from muon_dist.numerics import compute_dtype, kernel_name
from muon_dist.optim.binding import Binding
from muon_dist.optim.bucket_run import BucketRun, GroupStep, Observer, Orthogonalize, StepContext
from muon_dist.optim.compiler import COMPILED, ProgramCompiler
from muon_dist.optim.guard import Split
from muon_dist.optim.memory import RuleMemory
from muon_dist.optim.norms import RuleSums, feature_norms
from muon_dist.optim.options import Options
from muon_dist.optim.program import Program
from muon_dist.optim.rounding import MuonRounding, is_rounded
from muon_dist.optim.rules import RULES, Group, HeldWeights, MuonRule
from muon_dist.optim.rules.factors import scale_weights
from muon_dist.optim.rules.muon import GRADIENT, MOMENTUM, WEIGHT
from muon_dist.ownership import OwnershipPlan

_PROGRAMS = 32
"""Number of cached programs: a step in which some gradients are missing needs another program."""


@dataclass
class Work:
    """One buffer of this step: the local tensor, its gradient, its parameter group."""

    parameter: Tensor
    gradient: Tensor
    group: Group


class Runtime:
    """The optimizer state of one rank, and the step that updates it.

    Args:
        binding, plan: the framework's tensors, and the ownership plan.
        transport: sends messages over the binding's process group.
        group_of: parameter-group index of each buffer.
        options: options for all groups.
        orthogonalize: see the attribute.
        rules: the rule of each parameter group; by default Muon's.

    Attributes:
        momentum: buffer -> this rank's fp32 momentum. It has the local buffer's shape, padding included, if this rank
            is a source of everything that it holds, or if the buffer is in `everywhere`. Otherwise it is a flat tensor
            of the source fragments in the order of the buffer; no entry if this rank is no source.
        memory: the rules' state besides momentum.
        everywhere: buffers whose momentum every holder keeps, not only the sources.
        at_owners: buffers whose momentum the owners keep, as a part of `memory`.
        in_state: by parameter, the objects that we put into the optimizer's `state`, to detect objects that other code
            put there. None: we put no object there.
        orthogonalize: replaces a stack by its orthogonalized update; None: Newton-Schulz with the group's options.
        orthogonalized: number of matrices that this rank has orthogonalized since the start.
        resting: per matrix, the number of steps in a row with an exactly zero gradient, in fp64 on the CPU; equal on
            all ranks.
        unmoved: matrices whose gradients were always zero; their momentum is zero.
        splits: by buffer, its matrix, or a `Split` of its gradient if it has several matrices.
        observer: called with every matrix that this rank orthogonalizes; None: no observer.
    """

    def __init__(
        self,
        binding: Binding,
        plan: OwnershipPlan,
        transport: Transport,
        group_of: Mapping[int, int],
        options: Options,
        orthogonalize: Orthogonalize | None = None,
        rules: Mapping[int, MuonRule] | None = None,
    ) -> None:
        self.plan = plan
        self.binding = binding
        self.transport = transport
        self.options = options
        self.observer: Observer | None = None
        self.orthogonalized = 0
        self.momentum: dict[int, Tensor] = {}
        self.in_state: dict[Tensor, dict[str, Tensor | None]] = {}
        self._group_of = group_of
        self._elements = bucket_elements(options.bucket_bytes)
        self.orthogonalize = orthogonalize
        self._matrices = [m.matrix for m in plan.layout.matrices]
        rules = rules if rules is not None else dict.fromkeys(group_of.values(), RULES["muon"])
        self.at_owners = {b for b in range(len(binding.buffers)) if rules[group_of[b]].momentum_at_owner}
        self.everywhere = everywhere = binding.everywhere(plan, options.momentum_everywhere) - self.at_owners
        self._rounds = options.stochastic_rounding
        self._names = [clean_name(m.name) for m in self._matrices]
        self._rounded = {b for b, tensor in enumerate(binding.buffers) if self._rounds and is_rounded(tensor)}
        self.use_rules(rules)
        self._place_momentum(everywhere)
        self._counts = np.zeros(len(self._matrices))  # the memory of `resting`; indexing numpy is faster
        self.resting = torch.from_numpy(self._counts)
        self.unmoved = set(range(len(self._matrices)))
        self.splits = {b: self._split(b, members) for b, members in self.memory.matrices.items()}

    # State ------------------------------------------------------------------------------------------------------

    def use_rules(self, rules: Mapping[int, MuonRule]) -> None:
        """Use these rules from now on, with zero memory; local. rules: the rule of each parameter group."""
        plan, transport, options, everywhere = self.plan, self.transport, self.options, self.everywhere
        self._rules = rules
        self._programs: dict[tuple[object, ...], Program] = {}
        of_buffers = {b: rules[self._group_of[b]] for b in range(len(self.binding.buffers))}
        on_all = options.momentum_everywhere and plan.layout.kind == "replicated" and transport.world_size > 1
        self.memory = RuleMemory(plan, transport.rank, self.binding.device, of_buffers, self._rounded, on_all)
        self._compiler = ProgramCompiler(
            plan, transport, options, self.binding.device, self.memory.matrices, self._group_of, rules, everywhere
        )

    def _place_momentum(self, everywhere: Set[int]) -> None:
        rank, layouts = self.transport.rank, self.plan.layout.matrices
        local = [self.binding.local(tensor) for tensor in self.binding.buffers]
        matrices = self.memory.matrices
        shapes = {b: tuple(tensor.shape) for b, tensor in enumerate(local)}
        self._sources = Listing({b: parts_on(rank, matrices[b], self.plan.sources) for b in shapes}, shapes)
        self._readers: dict[int, Reader] = {}
        for buffer, tensor in enumerate(local):
            if buffer in self.at_owners:
                continue
            length = sum(f.length for _, f in self._sources.parts[buffer])
            whole = buffer in everywhere or length == sum(layouts[i].held(rank) for i in matrices[buffer])
            if whole or length:
                shape = tensor.shape if whole else (length,)
                self.momentum[buffer] = torch.zeros(shape, dtype=torch.float32, device=tensor.device)
                reader = self._sources.readers[buffer]
                self._readers[buffer] = reader if whole else reader.packed

    def _split(self, buffer: int, members: Sequence[int]) -> Split | int:
        if len(members) == 1:
            return members[0]
        held = parts_on(self.transport.rank, members, [m.fragments for m in self.plan.layout.matrices])
        held.sort(key=lambda part: part[1].local.start)
        shape = tuple(self.binding.local(self.binding.buffers[buffer]).shape)
        place = {i: n for n, i in enumerate(members)}
        return Split(Reader(shape, [f.local for _, f in held]), [place[i] for i, _ in held], members)

    def momentum_pieces(self, buffer: int) -> list[tuple[Matrix, Fragment, Tensor]]:
        """This rank's momentum in `buffer`: matrix, fragment, and the fragment's live view (rows, cols)."""
        if buffer not in self.momentum:
            return []
        parts, views = self._sources.parts[buffer], self._readers[buffer].views(self.momentum[buffer])
        return [
            (self._matrices[i], f, v.view(f.block.rows, f.block.cols)) for (i, f), v in zip(parts, views, strict=True)
        ]

    def forget(self, buffers: Iterable[int]) -> None:
        """Set momentum and the rules' memory of `buffers` to zero."""
        for buffer in buffers:
            if buffer in self.momentum:
                self.momentum[buffer].zero_()
            self.memory.clear(buffer)
            self.resting[self.memory.matrices[buffer]] = 0.0
            self.unmoved.update(self.memory.matrices[buffer])

    # One step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, work: dict[int, Work], zero: Set[int] = frozenset()) -> None:
        """Step the buffers of `work`; the same buffers on every rank. `zero`: matrices whose gradient is exactly zero.

        First momentum, then weight decay of all weights on this rank, then the updates, bucket by bucket.

        With overlap, while bucket i is orthogonalized, bucket i + 1 is gathered and bucket i - 1 is scattered. Bucket
        i - 1 is finished before the updates of bucket i are sent. The order depends only on the number of buckets,
        never on timing. So all ranks send the same messages in the same order, and the results equal those without
        overlap.
        """
        progress, overlap = self.transport.progress, self.options.overlap
        strided = [(w, w.parameter) for w in work.values() if not w.parameter.is_contiguous()]  # such as channels_last
        for w, parameter in strided:
            w.parameter = parameter.contiguous()
        progress.enter("momentum")
        step, program, sums = self._begin(work, zero)
        buckets = [BucketRun(bucket, step) for bucket in program.buckets]
        for i, bucket in enumerate(buckets):
            if bucket.program.gather is not None and (i == 0 or not overlap):
                bucket.gather()
            bucket.stack()
            if overlap and i + 1 < len(buckets) and buckets[i + 1].program.gather is not None:
                buckets[i + 1].gather()
            bucket.orthogonalize()
            self.orthogonalized += bucket.program.owned
            if overlap and i > 0:
                buckets[i - 1].update()
            bucket.scatter()
            if not overlap or i + 1 == len(buckets):
                bucket.update()
        if sums is not None:
            for p, factors in sums.end():
                held = [step.weights[n] for n in p.weights]
                if step.rounding is None:
                    scale_weights(held, p.weight_positions, factors)
                    continue
                for some in step.rounding.opened(p.weights, held, 1):
                    scale_weights(some.wide, [p.weight_positions[n] for n in some.members], factors)
        if self.memory.everywhere:
            self.memory.share(sorted(work), self.transport)
        for w, parameter in strided:
            parameter.copy_(w.parameter)
        phases = self.plan.layout.phases
        progress.step += len(phases) <= 1 or any(buffer in work for buffer in phases[-1])
        progress.enter("idle")

    def _begin(self, work: Mapping[int, Work], zero: Set[int]) -> tuple[StepContext, Program, RuleSums | None]:
        """Update momentum and decay the weights. Returns the buckets' shared data, the program, the rules' sums."""
        factor = self.binding.gradient_factor()
        parameters = {b: work[b].parameter for b in sorted(work)}
        gradients = {b: work[b].gradient for b in parameters}
        groups = {self._group_of[b]: work[b].group for b in parameters}
        key = (
            tuple((b, parameters[b].device, gradients[b].dtype) for b in parameters),
            tuple((i, *(group[option] for option in COMPILED)) for i, group in groups.items()),
        )
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) == _PROGRAMS:
                del self._programs[next(iter(self._programs))]
            program = self._programs[key] = self._compiler.compile(parameters, gradients, groups)
        weights = _views(program.weights.readers, parameters)
        sent = _views(program.sources.readers, gradients)
        # If the owners keep the momentum, use the gradients in its place: so the fragments keep their numbers.
        readers = {**{b: program.sources.readers[b] for b in self.at_owners & work.keys()}, **self._readers}
        momentum = _views({b: readers[b] for b in parameters if b in readers}, {**gradients, **self.momentum})
        for p in program.groups:
            kept = [momentum[n] for n in p.remembered] + [self.momentum[b] for b in p.everywhere]
            new = [sent[n] for n in p.remembered] + [gradients[b] for b in p.everywhere]
            for of_part in [(kept, new)] if p.fp32 and factor == 1.0 else _fp32(kept, new, factor, self._elements):
                if of_part[0]:
                    p.rule.remember(*of_part, groups[p.index])
        sums, factors, source_weights, features = None, {}, list[Tensor](), dict[int, Tensor]()
        if program.looks_at_weights:
            source_weights = _views(program.sources.readers, parameters)
            features = feature_norms(program, source_weights, self._matrices, self.transport)
        if program.summed:
            lists = {MOMENTUM: momentum, GRADIENT: sent, WEIGHT: source_weights}
            sums = RuleSums(program.summed, groups, self.memory, self._matrices, self.transport, lists, factor)
            factors = sums.begin()
        of_groups, rest = {}, {}
        for p in program.groups:
            group, of_matrices = groups[p.index], factors.get(p.index)
            of_groups[p.index] = GroupStep(group, p.rule, float(group["lr"]), of_matrices, p.position, features)
            if self.unmoved:
                self.unmoved.difference_update(i for i in p.matrices if i not in zero)
            if zero or self._counts.any():
                for i in p.matrices:
                    self._counts[i] = self._counts[i] + 1 if i in zero and i not in self.unmoved else 0
                    if i in zero and not p.rule.shrinks_with_momentum:
                        rest[i] = float(group["momentum"] ** self._counts[i])
            if p.weights and not self._rounds:
                own = [weights[n] for n in p.weights]
                p.rule.decay(HeldWeights(own, p.weight_positions, of_matrices, of_groups[p.index].lr), group)
        rounding = None
        if self._rounds:
            steps = self.memory.count(list(parameters))
            rounding = MuonRounding(self.options.rounding_seed, program.weights, self._names, steps)
        rounded = program.updates if rest else self.options.wire_dtype
        step = StepContext(
            self.transport, self.transport.progress, of_groups, weights, program.weights.matrices, sent, momentum,
            source_weights, factor, self.memory.owners, self.orthogonalize, self.observer, rounded, rest, rounding,
        )  # fmt: skip
        return step, program, sums

    # Programs ---------------------------------------------------------------------------------------------------

    def programs(self) -> list[Program]:
        """The cached programs of earlier steps."""
        return list(self._programs.values())

    def kernels(self, groups: Sequence[Group]) -> dict[tuple[int, int], str]:
        """Name of the iteration and matrix products, for each shape (rows, cols) that this rank orthogonalizes.

        groups: the optimizer's parameter groups.
        """
        names: dict[tuple[int, int], str] = {}
        compiled = self.options.ns_compile
        for i in self.plan.owned_by(self.transport.rank):
            m, group = self._matrices[i], groups[self._group_of[self.plan.layout.matrices[i].buffer]]
            dtype = compute_dtype(group["ns_dtype"], self.binding.device, group["ns_schedule"])
            names[m.rows, m.cols] = kernel_name(m.rows, m.cols, dtype, self.binding.device, compiled=compiled)
        return names


def _views(readers: Mapping[int, Reader], tensors: Mapping[int, Tensor]) -> list[Tensor]:
    """Views of the fragments in `tensors`, buffer after buffer."""
    found: list[Tensor] = []
    for buffer, reader in readers.items():
        if reader.whole:
            found.append(tensors[buffer])
        else:
            found += reader.views(tensors[buffer])
    return found


def _fp32(
    momentum: list[Tensor], gradients: list[Tensor], factor: float, elements: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Momentum and fp32 gradients times `factor`, in parts of about `elements`, to avoid a full copy of a gradient."""
    part: tuple[list[Tensor], list[Tensor]] = [], []
    taken = 0
    for m, g in zip(momentum, gradients, strict=True):
        if m.numel() == 0:
            continue
        rows = max(1, elements * len(m) // m.numel())
        for kept, given in zip(m.split(rows), g.split(rows), strict=True):
            if taken and taken + kept.numel() > elements:
                yield part
                part, taken = ([], []), 0
            new = given.to(torch.float32)
            part[0].append(kept)
            part[1].append(new if factor == 1.0 else new * factor)
            taken += kept.numel()
    yield part
