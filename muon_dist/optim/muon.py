"""`Muon`: one `torch.optim.Optimizer` with Muon groups and AdamW groups, sharded over a process group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from muon_dist.defaults import (
    BETAS,
    BUCKET_MB,
    COST,
    EPS,
    MAX_NONFINITE,
    MOMENTUM,
    NS_SCHEDULE,
    NS_STEPS,
    OWNER_POLICY,
    RULE,
    WEIGHT_DECAY,
)
from muon_dist.errors import ConfigError, FrameworkError, RoutingError
from muon_dist.exchange.progress import Progress
from muon_dist.exchange.transport import Transport
from muon_dist.numerics import ScheduleLike
from muon_dist.optim.adamw import AdamWork, adamw_step
from muon_dist.optim.binding import Binding, Group, NotReady, ParameterSpec
from muon_dist.optim.calls import called_as
from muon_dist.optim.checks import Kind, check_changed, check_keys, kind_of, unplanned
from muon_dist.optim.copies import MUON, packed, unpack
from muon_dist.optim.diagnostics import Diagnostics
from muon_dist.optim.frameworks import loaded_binders
from muon_dist.optim.gathered import carried
from muon_dist.optim.groups import Entries, groups_of, param_groups
from muon_dist.optim.guard import StepGuard, parameter_names
from muon_dist.optim.low_precision import prepare
from muon_dist.optim.options import DEFAULT_GROUP, Options, check_process_group, read_group
from muon_dist.optim.other_names import arguments_of, refuse_arguments
from muon_dist.optim.planning import agreed_plan, plain_binding, replaced_groups
from muon_dist.optim.replicas import check_alike
from muon_dist.optim.rules import MuonRule
from muon_dist.optim.rules.choice import DefaultFlag, DefaultNumber, DefaultText
from muon_dist.optim.runtime import Runtime, Work
from muon_dist.optim.state import Loaded, follow, install, say_bytes
from muon_dist.optim.state_dicts import StateDicts
from muon_dist.ownership import OwnershipPlan
from muon_dist.ownership.cost import CostModel

if TYPE_CHECKING:
    from muon_dist.audit.auditor import Audit


class Muon(StateDicts):
    """Muon for matrices and AdamW for all other parameters, exact under every sharding.

    The update of a matrix W with gradient G and momentum buffer B (Keller Jordan 2024, and `torch.optim.Muon`):

        B <- lerp(B, G, 1 - momentum);  U <- lerp(G, B, momentum) if nesterov else B
        W <- W (1 - lr weight_decay) - lr scale(W) newton_schulz(U)

    Momentum stays sharded; under DDP only the owner of a matrix has its momentum. Each matrix is gathered to its
    owner, orthogonalized there, and the update is scattered back. The plan is made at the first step, because
    frameworks replace parameters after the optimizer was created.

    Args:
        params: a model, or parameter groups such as those of `param_groups(model)`: dicts with `params` and
            `algorithm` ("muon" or "adamw"). A group may also have `param_names` (FQNs), `cuts` (per parameter None or
            a dict with `heads`, `sizes`, `transposed`; see `layout.cut_parameter`) and any option below. A group
            without `algorithm`, or a plain list of parameters, goes to Muon. A 3-D parameter is a batch of matrices.
        lr: learning rate of groups that do not set their own.
        weight_decay: decoupled; each step multiplies the weights by 1 - lr * weight_decay.
        momentum, nesterov: for Muon's groups. Schedulers that change AdamW's beta1 change momentum too.
        ns_steps, ns_schedule, ns_dtype: see `numerics.newton_schulz`. `ns_schedule` is a name, or your own rows
            [[a, b, c], ...].
        scale: "match_rms_adamw", "spectral", "unit_rms" or "none"; see `update_scale`.
        betas, eps: for AdamW's groups.
        process_group: the ranks that share the work. Default: all ranks of torch.distributed; None: this rank only.
        owner_policy: "balanced", "local" or "round_robin"; see `ownership.assign_owners`.
        cost: estimate of seconds per matrix for "balanced": "analytic", "measured" (rank 0 measures once and stores
            the times), or a `CostModel`.
        bucket_mb: a step allocates at most twice this much memory, in MiB, beyond the memory held between steps. A
            larger matrix raises the limit to its own size. See docs/performance.md.
        overlap: while a bucket is orthogonalized, gather the next bucket and scatter the previous one. The weights are
            bit-identical with and without it.
        ns_compile: run Newton-Schulz through `torch.compile`, compiled once per shape; a failure is an error.
        wire_dtype: dtype of sent momentum and updates. None: no rounding; bfloat16: half the bytes, rounded.
        max_nonfinite: a step with a NaN or infinite gradient on any rank changes nothing; this many such steps in a
            row raise NonFiniteError.
        diagnostics: a `Diagnostics`, or its arguments: spectral measures of each matrix, computed by its owner.
        rule: update rule of Muon's groups: "muon", "normuon", "adamuon", "soap_muon", "hyperball" or "namo"; see
            docs/rules.md.
        rule_options: the rule's own options, such as `beta2` of "normuon", and parts such as `cautious`.
        master_weights: keep an fp32 master of every 16-bit parameter (4 bytes per element); see
            docs/low-precision.md.
        stochastic_rounding: round bfloat16 parameters of both algorithms randomly, so that their mean is exact. The
            random numbers depend only on `rounding_seed`, name, step and element, so all layouts round equally.
        rounding_seed: see `stochastic_rounding`; equal on all ranks.
        momentum_everywhere: every rank that holds a copy of a weight keeps its momentum too (DDP, ZeRO-0, HSDP), 4
            bytes per element. Then `state_dict()` is complete on every rank.
        audit: an `audit.Audit`, or its settings such as {"every": 20}: other ranks recompute some of the steps; see
            docs/audit.md.
        groups: options by parameter name, if `params` is a model; as in `param_groups`.
        unknown: no other argument exists; the error for another optimizer's argument says what to write instead.

    Attributes:
        specs: per group, the parameters that the user passed, with their matrices under Muon.
        algorithms: per group, "muon" or "adamw".

    Raises:
        ConfigError: an option is unknown or out of range.
        RoutingError: no group goes to Muon, or a parameter with fewer than two axes is in a Muon group.
    """

    @called_as("muon_dist.Muon(muon_dist.param_groups(model), lr=0.003)")
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = DefaultNumber(WEIGHT_DECAY),
        momentum: float = MOMENTUM,
        nesterov: bool = DefaultFlag(True),  # type: ignore[assignment]
        ns_steps: int = NS_STEPS,
        ns_schedule: ScheduleLike = NS_SCHEDULE,
        ns_dtype: torch.dtype | None = None,
        scale: str = DefaultText("match_rms_adamw"),
        *,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        process_group: dist.ProcessGroup | str | None = DEFAULT_GROUP,
        owner_policy: str = OWNER_POLICY,
        cost: str | CostModel = COST,
        bucket_mb: float = BUCKET_MB,
        overlap: bool = True,
        ns_compile: bool = False,
        wire_dtype: torch.dtype | None = None,
        max_nonfinite: int = MAX_NONFINITE,
        diagnostics: Diagnostics | Mapping[str, Any] | None = None,
        rule: str = RULE,
        rule_options: Mapping[str, float | bool] | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        momentum_everywhere: bool = False,
        audit: Audit | Mapping[str, Any] | None = None,
        groups: Entries = (),
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            refuse_arguments("Muon", unknown, arguments_of(Muon), "param_groups", arguments_of(param_groups))
        check_process_group(process_group)
        self.process_group = process_group
        self._options = Options(
            owner_policy, cost, bucket_mb, overlap, ns_compile, wire_dtype,
            master_weights, stochastic_rounding, rounding_seed, momentum_everywhere,
        )  # fmt: skip
        self.guard = StepGuard(max_nonfinite)
        self.progress = Progress()
        self.diagnostics = Diagnostics.of(diagnostics)
        self.audit = _audit(audit)
        self.specs: list[list[ParameterSpec]] = []
        self.algorithms: list[str] = []
        self._kinds: list[Kind] = []
        self._rules: list[MuonRule | None] = []
        # All groups. A framework may step one group at a time and shorten `param_groups` to that group.
        self._groups: list[Group] = []
        defaults: dict[str, Any] = {
            "algorithm": "muon", "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_steps": ns_steps, "ns_schedule": ns_schedule, "ns_dtype": ns_dtype, "scale": scale,
            "betas": betas, "eps": eps,
        }  # fmt: skip
        self._default_rule = {"rule": rule, "rule_options": rule_options if rule_options is not None else {}}
        super().__init__(groups_of(params, groups), defaults)
        if "muon" not in self.algorithms:
            raise RoutingError("no parameter group has algorithm 'muon': use torch.optim.AdamW if that is intended")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. After the first step this call is a collective, and the next step makes a new plan."""
        param_group, index = dict(param_group), len(self.param_groups)
        where = f"group {param_group.get('name', index)}"
        check_keys(param_group, self.defaults, where)
        if self._runtime is not None:
            self._loaded, self._runtime = carried(self._runtime, self.state), None
        cuts = param_group.pop("cuts", None)
        given = set(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._groups.append(group)
        rule, specs = read_group(group, index, cuts, given, where, self._default_rule)
        self._rules.append(rule)
        self.algorithms.append(group["algorithm"])
        self._kinds.append(kind_of(group))
        self.specs.append(specs)
        if self._loaded is not None:
            self._loaded.update((p, Loaded(fresh=True)) for p in group["params"])

    def __getstate__(self) -> dict[str, Any]:
        return packed(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({key: value for key, value in state.items() if key != MUON})
        if MUON in state:  # not in the call from torch's own load_state_dict
            unpack(self, state)

    @property
    def runtime(self) -> Runtime | None:
        """The object that runs the plan; None before the first step or `bind`."""
        return self._runtime

    @property
    def plan(self) -> OwnershipPlan | None:
        """The ownership plan, with its layout; None before the first step or `bind`."""
        return self._runtime.plan if self._runtime is not None else None

    @property
    def orthogonalized(self) -> int:
        """Number of matrices that this rank has orthogonalized since the start."""
        return 0 if self._runtime is None else self._runtime.orthogonalized

    def bind(
        self,
        binding: Binding,
        groups: dict[int, int],
        transport: Transport | None = None,
        *,
        compare_copies: bool = True,
    ) -> None:
        """Make the plan for the framework's tensors. An adapter calls this; without one the first step does.

        Args:
            binding: layout, buffers, process group and device.
            groups: index of the parameter group of each buffer.
            transport: sends the messages; by default over the binding's process group.
            compare_copies: in the first step, compare tensors that should be equal on several ranks.

        Raises:
            LayoutError: the layout and this optimizer have different matrices.
            PlanMismatchError: the ranks computed different plans.
        """
        transport = transport or Transport(binding.group, binding.device, self.progress, binding.column)
        plan = agreed_plan(binding, groups, self._groups, self.specs, self._options, transport)
        rules = {index: rule for index, rule in enumerate(self._rules) if rule is not None}
        self._runtime = Runtime(binding, plan, transport, groups, self._options, rules=rules)
        self._copies_compared = not compare_copies
        if self.diagnostics is not None:
            self.diagnostics.begin(plan.names_owned_by(transport.rank))
            self._runtime.observer = self.diagnostics.observe
        self._buffer_of: dict[int, int] = {id(tensor): i for i, tensor in enumerate(binding.buffers)}
        runtime, loaded = self._runtime, self._loaded
        transport.progress.enter("optimizer state")
        transport.ranks.everywhere(lambda: install(runtime, self.state, loaded))
        self._loaded = None
        say_bytes(runtime)
        self._masters, self._rounding = prepare(
            self._options, self._named(), lambda: self.state, binding, transport.rank
        )

    def bound_runtime(self) -> Runtime:
        """The runtime. The first call makes the plan, which is a collective.

        Raises:
            FrameworkError: the framework around the optimizer is still being built.
        """
        if self._runtime is None and not self._bind_first():
            raise FrameworkError("the framework has not finished making the optimizer: save or load afterwards")
        assert self._runtime is not None
        follow(self._runtime, self.state)
        return self._runtime

    def _bind_first(self) -> bool:
        """Bind through an adapter, or without a framework; False while a framework is still being built."""
        for binder in loaded_binders():
            answer = binder(self)
            if isinstance(answer, NotReady):
                return False
            if answer is not None:
                self.bind(*answer)
                return True
        self.bind(*plain_binding(self.param_groups, self.specs, self.process_group))
        return True

    # Stepping -------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. With a process group it is a collective: every rank must call it.

        A parameter without a gradient on all ranks does not change. If only some ranks lack the gradient, it counts as
        zero there. If a gradient is NaN or infinite on any rank, the step changes nothing on any rank.

        Raises:
            ConfigError: the algorithm or rule of a group was changed.
            NonFiniteError: `max_nonfinite` such steps in a row.
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
        try:
            self._step(self._runtime)
        except RuntimeError as error:
            failure = self._runtime.transport.named(error)
            if failure is None:
                raise
            raise failure from error
        return loss

    def _step(self, runtime: Runtime) -> None:
        binding, progress = runtime.binding, runtime.transport.progress
        binding.before_step()
        # If `state` holds another object than we put there, other code replaced it: use its object.
        if any(self.state.get(p, {}).get(k) is not v for p, kept in runtime.in_state.items() for k, v in kept.items()):
            follow(runtime, self.state)
        if any(all(group is not known for known in self._groups) for group in self.param_groups):
            self._groups = replaced_groups(self._groups, self.param_groups)
        for group in self.param_groups:
            if "max_momentum" in group:  # torch's cyclic schedulers change betas[0] instead of momentum if betas exist
                group["momentum"] = group["betas"][0]
        # Read once, because the host waits for a rate that is a GPU tensor.
        rates = [float(group[key]) for group in self.param_groups for key in ("lr", "weight_decay", "momentum")]
        kinds = [(g.get("algorithm"), g.get("rule", "muon"), {*(g.get("rule_options") or ())}) for g in self._groups]
        if kinds != self._kinds or not all(0.0 <= rate < math.inf for rate in rates):
            check_changed(self._groups, self._kinds)
        index_of = {id(group): i for i, group in enumerate(self._groups)}
        present = [(index_of[id(group)], p) for group in self.param_groups for p in group["params"]]
        parts = [(p, p.grad) if binding.parts is None else binding.parts(p) for _, p in present]
        allowed = self.guard.allows(
            runtime.transport, [p for _, p in present], [gradient for _, gradient in parts],
            lambda: parameter_names(self._groups, self.specs, [i for i, _ in present]),
            agreed=binding.finite(), complete=runtime.plan.layout.complete_gradients,
            matrices=[runtime.splits.get(self._buffer_of.get(id(p), -1)) for _, p in present],
            copies=runtime.plan.layout.kind == "replicated", rates=rates,
        )  # fmt: skip
        if allowed is None:
            if self.guard.begins:
                progress.finish_step()
            return
        if not self._copies_compared or not allowed.alike:
            check_alike(binding, runtime.transport, self.param_groups, rates)
            self._copies_compared = True
        work: dict[int, Work] = {}
        adamw: dict[int, list[AdamWork]] = {}
        for (index, p), (local, gradient), wanted in zip(present, parts, allowed.present, strict=True):
            if not wanted or (local.numel() == 0 and id(p) not in self._buffer_of):
                continue
            if self._masters is not None:
                local = self._masters.open(p, local)
            if gradient is None:
                gradient = torch.zeros_like(local)
            elif gradient.is_sparse:
                raise ConfigError("sparse gradients are not supported: make the embedding with sparse=False")
            if self.algorithms[index] != "muon":
                adamw.setdefault(index, []).append((p, local, gradient))
                continue
            buffer = self._buffer_of.get(id(p))
            if buffer is None:
                raise unplanned(p, index)
            work[buffer] = Work(local, gradient, self._groups[index])
        call = self.audit.before(self, work, adamw, present, allowed.zero, rates) if self.audit is not None else None
        progress.enter("adamw")
        for i, items in adamw.items():
            adamw_step(self._groups[i], self.state, items, binding.local, self._options.bucket_bytes, self._rounding)
        runtime.step(work, allowed.zero)
        if call is not None and self.audit is not None:
            self.audit.after(self, call)
        if self._masters is not None:
            self._masters.close()


def _audit(given: Audit | Mapping[str, Any] | None) -> Audit | None:
    """The argument `audit` as an object. Raises ConfigError for an invalid setting."""
    if given is None:
        return None
    from muon_dist.audit.auditor import Audit  # here, because it imports this package

    if not isinstance(given, (Audit, Mapping)):
        raise ConfigError(f'audit is {given!r}: give a dict such as {{"every": 20}}, or an Audit')
    return Audit(given) if isinstance(given, Mapping) else given
