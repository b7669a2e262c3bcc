"""`Muon`: one `torch.optim.Optimizer` with Muon groups and AdamW groups, sharded over a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.cost import CostModel
from muon_dist.errors import ConfigError, LayoutError, RoutingError
from muon_dist.exchange.progress import Progress
from muon_dist.exchange.transport import Transport
from muon_dist.frameworks import loaded_binders
from muon_dist.layout import replicated_layout
from muon_dist.numerics.compiled import check_compiler
from muon_dist.optim.adamw import adamw_step
from muon_dist.optim.binding import BINDERS, Binding, Group, NotReady, ParameterSpec
from muon_dist.optim.costs import agreed_cost, owners_for
from muon_dist.optim.diagnostics import Diagnostics
from muon_dist.optim.guard import StepGuard, parameter_names
from muon_dist.optim.options import DEFAULT_GROUP, Options, check_group, check_process_group, make_spec
from muon_dist.optim.planning import check_covers, check_order, check_untouched, default_process_group, group_fields
from muon_dist.optim.replicas import check_copies
from muon_dist.optim.runtime import Runtime, Work
from muon_dist.optim.state import (
    MOMENTUM,
    PARTIAL,
    adopt_momentum,
    full_state_dict,
    missing_momentum,
    partial_momentum,
    split_momentum,
    warn_of_partial_state,
)
from muon_dist.ownership import OwnershipPlan


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz for matrices, AdamW for the rest, exact under every sharding.

    The update of a matrix W with gradient G and momentum buffer B (Keller Jordan 2024, and `torch.optim.Muon`):

        B <- lerp(B, G, 1 - momentum);  U <- lerp(G, B, momentum) if nesterov else B
        W <- W (1 - lr weight_decay) - lr scale(W) newton_schulz(U)

    Momentum stays sharded. Each matrix is gathered to one owning rank, orthogonalized there, and the update
    scattered back; under DDP it lives on the owner alone. The plan is made at the first step, because frameworks
    replace parameters after an optimizer is made.

    Args:
        params: parameter groups, as from `param_groups(model)`: dicts with `params` and `algorithm` ("muon" or
            "adamw"), optionally `param_names` (FQNs), `cuts` (for each parameter None or a dict with `heads`,
            `sizes`, `transposed`; see `layout.cut_parameter`) and any option below. A group without `algorithm`, or
            a plain list of parameters, is Muon's. 3-D parameters are batches of matrices.
        lr: learning rate of groups that do not set their own.
        weight_decay: decoupled, times lr.
        momentum, nesterov: of Muon groups.
        ns_steps, ns_schedule, ns_dtype: see `numerics.newton_schulz`.
        scale: "match_rms_adamw", "spectral" or "none"; see `update_scale`.
        betas, eps: of AdamW groups.
        process_group: ranks that share the work: the default group when one is initialised, another, or None for
            no sharding at all.
        owner_policy: "balanced", "local" or "round_robin"; see `ownership.assign_owners`.
        cost: what "balanced" balances: "analytic", "measured" (timed once on rank 0 and kept), or a `CostModel`.
        bucket_mb: a step allocates at most twice this, in MiB, beside what is there between steps; a matrix too
            large for that goes alone. See docs/performance.md.
        overlap: gather the next bucket and scatter the one before while a bucket is orthogonalized. The result is the
            same, bit for bit.
        ns_compile: run Newton-Schulz through `torch.compile`, once for each shape; a machine that cannot is refused
            when the plan is made.
        wire_dtype: dtype in which momentum and updates travel. None loses nothing; torch.bfloat16 halves the bytes of
            the gather at the cost of rounding what is orthogonalized.
        max_nonfinite: a step in which a gradient is NaN or infinite on any rank is left out, with everything unchanged
            on all ranks; after so many in a row NonFiniteError is raised.
        diagnostics: a `Diagnostics`, or its arguments: spectral measures of each matrix, taken on its owner.

    Raises:
        ConfigError: an option is unknown or out of range.
        RoutingError: no group is Muon's, or a parameter with fewer than two axes is in a Muon group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_schedule: str = "keller",
        ns_dtype: torch.dtype | None = None,
        scale: str = "match_rms_adamw",
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        process_group: dist.ProcessGroup | str | None = DEFAULT_GROUP,
        owner_policy: str = "balanced",
        cost: str | CostModel = "analytic",
        bucket_mb: float = 256.0,
        overlap: bool = True,
        ns_compile: bool = False,
        wire_dtype: torch.dtype | None = None,
        max_nonfinite: int = 5,
        diagnostics: Diagnostics | Mapping[str, Any] | None = None,
    ) -> None:
        check_process_group(process_group)
        self.process_group = process_group
        self._options = Options(owner_policy, cost, bucket_mb, overlap, ns_compile, wire_dtype)
        self.guard = StepGuard(max_nonfinite)
        self.progress = Progress()
        self.diagnostics = Diagnostics(**diagnostics) if isinstance(diagnostics, Mapping) else diagnostics
        self._specs: list[list[ParameterSpec]] = []
        # Kept beside param_groups: a universal load of DeepSpeed overwrites every group's options with group 0's.
        self._algorithms: list[str] = []
        # All groups, also while a framework steps them one at a time with `param_groups` cut down to that one.
        self._groups: list[Group] = []
        self._gathered: dict[str, Any] | None = None
        self._runtime: Runtime | None = None
        self._copies_compared = self._warned_of_partial_state = False
        self._loaded: dict[torch.Tensor, tuple[torch.Tensor, list[str] | None]] | None = None
        self._buffer_of: dict[int, int] = {}
        defaults = {
            "algorithm": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_schedule": ns_schedule,
            "ns_dtype": ns_dtype,
            "scale": scale,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)
        if "muon" not in self._algorithms:
            raise RoutingError("no parameter group has algorithm 'muon': use torch.optim.AdamW if that is intended")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; only before the first step, since the plan covers all groups."""
        if self._runtime is not None:
            raise ConfigError("a parameter group cannot be added after the first step: the ownership plan is made")
        param_group = dict(param_group)
        cuts = param_group.pop("cuts", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        index = len(self.param_groups) - 1
        self._groups.append(group)
        check_group(group, f"group {group.get('name', index)}")
        names = group.get("param_names") or [f"group{index}.param{i}" for i in range(len(group["params"]))]
        cuts = cuts if cuts is not None else [None] * len(names)
        if len(cuts) != len(names):
            raise ConfigError(f"group {index} has {len(cuts)} cuts for {len(names)} parameters")
        self._algorithms.append(group["algorithm"])
        self._specs.append(
            [make_spec(n, p, group["algorithm"], c) for n, p, c in zip(names, group["params"], cuts, strict=True)]
        )

    # Planning -------------------------------------------------------------------------------------------------------

    @property
    def specs(self) -> list[list[ParameterSpec]]:
        """The parameters of each group as they were given, with the matrices of Muon's."""
        return self._specs

    @property
    def algorithms(self) -> list[str]:
        """The algorithm of each group."""
        return self._algorithms

    @property
    def runtime(self) -> Runtime | None:
        """What executes the plan; None before the first step or `bind`."""
        return self._runtime

    @property
    def plan(self) -> OwnershipPlan | None:
        """Layout and owners; None before the first step or `bind`."""
        return self._runtime.plan if self._runtime is not None else None

    @property
    def orthogonalized(self) -> int:
        """Matrices orthogonalized on this rank since the start."""
        return self._runtime.orthogonalized if self._runtime is not None else 0

    def bind(self, binding: Binding, groups: dict[int, int]) -> None:
        """Plan on the tensors that a framework really keeps. Called by adapters, and at the first step otherwise.

        Args:
            binding: layout, buffers, process group and device.
            groups: index of the parameter group of each buffer.

        Raises:
            LayoutError: the layout does not hold exactly the matrices that this optimizer was given.
            PlanMismatchError: the ranks computed different plans.
        """
        plan, fields, problem = None, None, None
        cost = agreed_cost(self._options.cost, binding, self._groups, groups)
        try:
            check_covers(self._specs, binding)
            plan = owners_for(binding, self._groups, groups, self._options, cost)
            # options first: they also move owners, and the first difference is the one that is named
            of_groups = group_fields(self._groups, groups, binding.device)
            fields = [*self._options.fields(), *of_groups, *cost.fields(), *plan.fields()]
            if self._options.ns_compile:
                check_compiler(binding.device)
        except Exception as error:
            problem = error
        transport = Transport(binding.group, binding.device, self.progress, binding.column)
        transport.require_equal("ownership plan", fields, problem)
        assert plan is not None
        self._runtime = Runtime(binding, plan, transport, groups, self._options)
        self._copies_compared = False
        if self.diagnostics is not None:
            self.diagnostics.attach(self._runtime)
        self._buffer_of = {id(tensor): i for i, tensor in enumerate(binding.buffers)}
        self._install_momentum()

    def _install_momentum(self) -> None:
        """Put the shards into `state`, with the momentum that was loaded before, if any."""
        assert self._runtime is not None
        if self._loaded is not None:
            adopt_momentum(self._runtime, self._loaded)
            self._loaded = None
        binding, plan = self._runtime.binding, self._runtime.plan
        for buffer, parameter in enumerate(binding.buffers):
            stored = binding.stored(plan, buffer, self._runtime.momentum.get(buffer))
            if stored is not None:
                self.state[parameter][MOMENTUM] = stored

    def _bind_first(self) -> bool:
        """Bind through an adapter, or to the parameters as they are; False while a framework is still being built."""
        for binder in (*BINDERS, *loaded_binders()):
            answer = binder(self)
            if isinstance(answer, NotReady):
                return False
            if answer is not None:
                self.bind(*answer)
                return True
        check_untouched(self.param_groups, self._specs)
        group = default_process_group(self.process_group)
        buffers: list[torch.Tensor] = []
        matrices = []
        groups: dict[int, int] = {}
        for index, specs in enumerate(self._specs):
            for p, spec in zip(self.param_groups[index]["params"], specs, strict=True):
                if spec.matrices:
                    groups[len(buffers)] = index
                    buffers.append(p)
                    matrices.append(spec.matrices)
        world = dist.get_world_size(group) if group is not None else 1
        device = buffers[0].device if buffers else torch.device("cpu")
        self.bind(Binding(replicated_layout(matrices, world), tuple(buffers), group, device), groups)
        return True

    # Stepping -------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. With a process group it is a collective: every rank must call it.

        A parameter without a gradient on any rank is left alone; one without a gradient on some counts as zero there.
        With a gradient that is NaN or infinite on any rank, the step changes nothing on all ranks.

        Raises:
            NonFiniteError: the `max_nonfinite`-th such step in a row.
            ReplicaError: in the first step, ranks that should hold copies have different weights or gradients.
            PeerError: a message to or from another rank failed; names the operation, bucket and step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._runtime is None and not self._bind_first():
            return loss
        assert self._runtime is not None
        with self._runtime.transport.named_failures():
            self._step(self._runtime)
        return loss

    def _step(self, runtime: Runtime) -> None:
        local, progress = runtime.binding.local, runtime.transport.progress
        present = [(self._index(group), p) for group in self.param_groups for p in group["params"]]
        has_gradient = self.guard.allows(
            runtime.transport,
            [p for _, p in present],
            [None if p.grad is None else local(p.grad) for _, p in present],
            lambda: parameter_names(self._groups, self._specs, [i for i, _ in present]),
            agreed=runtime.binding.finite(),
            complete=runtime.plan.layout.complete_gradients,
        )
        if has_gradient is None:
            if self.guard.begins:
                progress.finish_step()
            return
        if not self._copies_compared:
            check_copies(runtime.binding)
            self._copies_compared = True
        work: dict[int, Work] = {}
        adamw: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for (index, p), wanted in zip(present, has_gradient, strict=True):
            if not wanted:
                continue
            gradient = p.grad if p.grad is not None else torch.zeros_like(p)
            if gradient.is_sparse:
                raise ConfigError("sparse gradients are not supported: make the embedding with sparse=False")
            if self._algorithms[index] == "muon":
                work[self._buffer(index, p)] = Work(local(p), local(gradient), self._groups[index])
            else:
                adamw.setdefault(index, []).append((p, gradient))
        progress.enter("adamw")
        for index, pairs in adamw.items():
            adamw_step(self._groups[index], self.state, pairs)
        runtime.step(work)

    def _index(self, group: Group) -> int:
        index = next((i for i, known in enumerate(self._groups) if known is group), None)
        if index is not None:
            return index
        if len(self.param_groups) != len(self._groups):
            raise LayoutError(
                f"group '{group.get('name', group.get('algorithm'))}' is not one of the {len(self._groups)} that Muon "
                "was made with: change a group in place instead of replacing it"
            )
        self._groups = list(self.param_groups)
        return self._index(group)

    def _buffer(self, index: int, p: torch.Tensor) -> int:
        buffer = self._buffer_of.get(id(p))
        if buffer is None:
            raise LayoutError(
                f"a tensor of shape {tuple(p.shape)} in group {index} is not one that the plan was made for: "
                "parameters may not be replaced after the first step"
            )
        return buffer

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: its own momentum, and AdamW's state as kept here; local. See `full_state_dict`.

        A RuntimeWarning says once when this part lacks momentum that lies on other ranks, as under DDP.
        """
        if self._gathered is not None:
            return self._gathered
        if not self._warned_of_partial_state and (missing := missing_momentum(self)):
            self._warned_of_partial_state = True
            warn_of_partial_state(self, missing)
        packed = super().state_dict()
        if partial := partial_momentum(self):
            packed[PARTIAL] = partial
        return packed

    def full_state_dict(self) -> dict[str, Any]:
        """The state of a single process, gathered to rank 0 of the process group; a collective.

        Rank 0 gets a state_dict that `load_state_dict` takes on any number of ranks, others get {}.
        """
        return full_state_dict(self)

    def gather_state(self) -> None:
        """Until `release_state`, let `state_dict()` be `full_state_dict()` on rank 0; a collective.

        For a framework that saves the state dict of rank 0 alone: its hook before a save, on all ranks.
        """
        self._gathered = self.full_state_dict() or None

    def release_state(self) -> None:
        """Let `state_dict()` be this rank's part again."""
        self._gathered = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `full_state_dict()`, or this rank's own `state_dict()`; local, on every rank.

        Momentum is kept in fp32 whatever the parameters' dtype, and taken apart for this rank's plan.

        Raises:
            ConfigError: a group's algorithm differs.
            CheckpointError: momentum of a matrix that this rank holds is missing (another rank's state_dict), or the
                parameters of a group were in another order.
        """
        saved = [g.get("algorithm", "muon") for g in state_dict["param_groups"]]
        if saved != self._algorithms:
            raise ConfigError(f"the saved groups are {saved}, this optimizer's are {self._algorithms}")
        check_order(state_dict["param_groups"], self._specs)
        momentum, rest = split_momentum(self, state_dict)
        super().load_state_dict(rest)
        self._groups = list(self.param_groups)
        self._loaded = momentum if state_dict["state"] else None
        if self._runtime is not None:
            if self._loaded is None:
                for shard in self._runtime.momentum.values():
                    shard.zero_()
            self._install_momentum()
            return
        for p, (value, _) in momentum.items():
            self.state[p][MOMENTUM] = value
