"""One test for each way in which DeepSpeed's own Muon went wrong (docs/deepspeed.md has the figures), and traps of
the wrappers. Newton-Schulz calls, momentum's shape and zero.Init are asserted for every case of test_deepspeed.py."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailure, run_ranks

pytest.importorskip("deepspeed")

import deepspeed

import muon_dist
from muon_dist.adapters.deepspeed import check_config, check_partitioned, check_zero_settings
from muon_dist.errors import ConfigError, FrameworkError
from tests.adapters.deepspeed_ranks import (
    Case,
    Truth,
    backward,
    batch,
    ds_config,
    full_gradient,
    make_engine,
    make_model,
    master,
    split_fp16,
    why_no_fp16,
)

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
Tensors = dict[str, torch.Tensor]


def errors(truth: Truth, found: Tensors, start: Tensors) -> tuple[float, float]:
    """Largest relative error of an update: (of Muon's parameters, of AdamW's)."""
    worst = {True: 0.0, False: 0.0}
    for name in truth.options:
        wanted = truth.weights[name].detach() - start[name]
        error = ((found[name] - start[name] - wanted).norm() / wanted.norm()).item()
        worst[name in truth.momentum] = max(worst[name in truth.momentum], error)
    return worst[True], worst[False]


def gradients_of(engine: Any) -> Tensors:
    return {n: full_gradient(engine, p) for n, p in engine.module.named_parameters()}


# 1, 10: the clip must not touch the orthogonalized update, and the reported norm is the raw gradient's -------------


def _clipped(case: Case, clip_muon: bool) -> tuple[float, float, float, float]:
    bound = case.config["gradient_clipping"]
    engine, optimizer = make_engine(case)
    if case.attach:
        muon_dist.attach(engine, clip_muon=clip_muon)
    start = master(engine, optimizer)
    truth = Truth(start, optimizer)
    reported = 0.0
    for step in range(4):
        backward(engine, step, case.accumulation)
        gradients = gradients_of(engine)
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()])).item()
        engine.step()
        if hasattr(engine.optimizer, "_global_grad_norm"):
            reported = max(reported, abs(float(engine.get_global_grad_norm()) / norm - 1))
        factor = 1 / max(1.0, (norm + 1e-6) / bound)
        if clip_muon:
            gradients = {n: g * (factor if n in truth.momentum else 1) for n, g in gradients.items()}
        truth.step(gradients, adamw_factor=factor)
    muon, adamw = errors(truth, master(engine, optimizer), start)
    engine.destroy()
    return muon, adamw, reported, norm


TIGHT = {"gradient_clipping": 0.05}
CLIPPED = [
    Case(0, config=TIGHT),
    Case(0, "bf16", config=TIGHT),
    Case(1, config=TIGHT),
    Case(1, "bf16", config={**TIGHT, **BF16_OPTIMIZER}),
    Case(2, "fp16", config=TIGHT),
    Case(2, zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}}, config=TIGHT),
    Case(3, config=TIGHT),
]


@pytest.mark.parametrize("cases", split_fp16(CLIPPED))
@pytest.mark.parametrize("clip_muon", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_clip_acts_on_the_raw_gradient_and_exempts_muon(clip_muon, cases):
    cases = [replace(case, attach=clip_muon or (case.stage, case.dtype) == (0, "fp32")) for case in cases]
    for case, (muon, adamw, reported, norm) in zip(cases, _in_one(_clipped, cases, clip_muon), strict=True):
        assert norm > 0.5, "the clip must bite"
        assert muon < 1e-5 and adamw < 1e-4, (case, muon, adamw)
        assert reported < 1e-3, (case, reported)


def _all(fn: Any, cases: list[Case], args: tuple[Any, ...]) -> list[Any]:
    return [fn(case, *args) for case in cases]


def _in_one(fn: Any, cases: list[Case], *args: Any, world: int = 2) -> list[Any]:
    """`fn(case, *args)` for each case, on forked ranks made once; the first rank's answers."""
    return run_ranks(_all, world, fn, cases, args, timeout=60.0 + 30 * len(cases))[0]


def test_without_attach_stage_0_in_fp32_warns_that_the_clip_stays():
    with pytest.raises(RankFailure, match=r"call muon_dist\.attach"):
        run_ranks(_warnings_are_errors, 1, Case(0, config={"gradient_clipping": 0.05}))


def _warnings_are_errors(case: Case) -> None:
    import warnings

    engine, _ = make_engine(case)
    backward(engine, 0, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gradient_clipping")
        engine.step()


# 2: momentum in true units across changes of the loss scale --------------------------------------------------------


def _scale_changes(case: Case) -> tuple[float, float, list[float]]:
    engine, optimizer = make_engine(case)
    start = master(engine, optimizer)
    truth = Truth(start, optimizer)
    scales = []
    for step in range(12):
        backward(engine, step, 1)
        scales.append(engine.optimizer.loss_scale)
        gradients = gradients_of(engine)
        engine.step()
        truth.step(gradients)
    found = {n: p for n, p in engine.module.named_parameters() if n in truth.momentum}
    cosine = 1.0
    for n, p in found.items():
        momentum = deepspeed.utils.safe_get_full_optimizer_state(p, "momentum_buffer").reshape(-1)
        cosine = min(cosine, torch.cosine_similarity(momentum, truth.momentum[n].reshape(-1), dim=0).item())
    muon, _ = errors(truth, master(engine, optimizer), start)
    engine.destroy()
    return muon, cosine, scales


@pytest.mark.fp16
def test_momentum_is_in_true_units_under_dynamic_loss_scale():
    config = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 4}}
    cases = [Case(s, "fp16", config={**config, "gradient_clipping": c}) for s, c in ((1, 0.0), (2, 0.05), (3, 0.05))]
    for case, (muon, cosine, scales) in zip(cases, _in_one(_scale_changes, cases), strict=True):
        assert len(set(scales)) >= 3, scales
        assert muon < 1e-5 and cosine > 1 - 1e-6, (case, muon, cosine)


# 3, 4, 5: no work and no state twice -------------------------------------------------------------------------------


def _state_sizes(case: Case) -> tuple[int, int, int, int]:
    engine, optimizer = make_engine(case)
    backward(engine, 0, 1)
    engine.step()
    runtime = optimizer.runtime
    sizes = sum(m.numel() for m in runtime.momentum.values())
    sources = sum(f.length for s in runtime.plan.sources for f in s if f.rank == dist.get_rank())
    kinds = {m.dtype for m in runtime.momentum.values()}
    assert kinds == {torch.float32}, kinds  # 6: momentum in bf16
    result = sizes, sources, runtime.plan.layout.numel, optimizer.orthogonalized
    engine.destroy()
    return result


def _state_sizes_of(cases: list[Case]) -> list[tuple[int, int, int, int]]:
    return [_state_sizes(c) for c in cases]


@pytest.mark.parametrize("world", [2, 4])
def test_momentum_and_newton_schulz_exist_once(world):
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    cases = [Case(0), Case(0, "bf16"), Case(1, "bf16"), Case(2, zero=offload), Case(3, "bf16", zero=offload)]
    by_rank = run_ranks(_state_sizes_of, world, cases, timeout=200.0)
    matrices = sum(len(s.matrices) for specs in muon_specs() for s in specs)
    for i, case in enumerate(cases):
        rows = [results[i] for results in by_rank]
        total = rows[0][2]
        assert sum(sources for _, sources, _, _ in rows) == total, case
        padding = sum(size for size, _, _, _ in rows) - total
        assert 0 <= padding <= matrices * world, case
        assert sum(calls for *_, calls in rows) == matrices, case


def muon_specs() -> list[Any]:
    from tests.adapters.deepspeed_ranks import make_muon

    return make_muon(make_model("llama"), Case(0)).specs


# 6: momentum stays fp32 over many bf16 steps -----------------------------------------------------------------------


@pytest.mark.slow
def _many_steps(case: Case) -> float:
    engine, optimizer = make_engine(case)
    start = master(engine, optimizer)
    truth = Truth(start, optimizer)
    for step in range(40):
        backward(engine, step % 8, 1)
        gradients = gradients_of(engine)
        engine.step()
        truth.step(gradients)
    muon, _ = errors(truth, master(engine, optimizer), start)
    engine.destroy()
    return muon


def test_bf16_momentum_is_exact_after_many_steps():
    cases = [Case(1, "bf16")]
    assert max(_in_one(_many_steps, cases)) < 1e-5


# 9: routing by what a module is ------------------------------------------------------------------------------------


def test_embeddings_of_gpt2_go_to_adamw():
    groups = muon_dist.param_groups(make_model("gpt2"), lr=0.1)
    names = {g["algorithm"]: g["param_names"] for g in reversed(groups)}
    others = {name for g in groups[1:] for name in g["param_names"]}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= others
    assert not any("wte" in n or "wpe" in n for n in names["muon"])


# 8432: overflow changes nothing ------------------------------------------------------------------------------------


def _snapshot(engine: Any, optimizer: Any) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in engine.module.parameters()]
    for state in optimizer.state.values():
        tensors += [v.clone() for v in state.values() if torch.is_tensor(v)]
    return tensors + list(master(engine, optimizer).values())


def _overflow(case: Case) -> tuple[bool, float]:
    engine, optimizer = make_engine(case)
    start = master(engine, optimizer)
    truth = Truth(start, optimizer)
    unchanged = True
    for step in range(4):
        poisoned = step == 2
        if poisoned:  # on one rank alone
            tokens = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss * (float("inf") if dist.get_rank() == 1 else 1.0))
        else:
            backward(engine, step, 1)
            gradients = gradients_of(engine)
        before = _snapshot(engine, optimizer)
        engine.step()
        if poisoned:
            after = _snapshot(engine, optimizer)
            unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        else:
            truth.step(gradients)
    muon, _ = errors(truth, master(engine, optimizer), start)
    engine.destroy()
    return unchanged, muon


OVERFLOWING = [
    *(Case(0, "bf16"), Case(1), Case(1, "bf16", config=BF16_OPTIMIZER)),
    *(Case(s, d) for s in (1, 2, 3) for d in ("bf16", "fp16")),
    # where DeepSpeed does not look, and Muon decides: with its own check, and from DeepSpeed's norm
    *(Case(0), *(Case(s, "bf16", config={"bf16": {"check_grad_overflow": False}}) for s in (1, 2))),
]


@pytest.mark.parametrize("cases", split_fp16(OVERFLOWING))
def test_overflow_on_one_rank_changes_nothing_anywhere(cases):
    for case, (unchanged, muon) in zip(cases, _in_one(_overflow, cases), strict=True):
        assert unchanged, case
        assert muon < 1e-5, (case, muon)


# 8440, 7713: the caller's groups and scheduler ---------------------------------------------------------------------


def _own_groups(case: Case) -> tuple[float, float, list[list[float]]]:
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model(case.model)
    groups = muon_dist.param_groups(model, lr=0.02, weight_decay=0.1, adamw_lr=3e-3)
    first = groups[0]
    cut = len(first["params"]) // 2
    lists = ("params", "param_names", "cuts")
    second = {k: (v[cut:] if k in lists else v) for k, v in first.items()} | {"lr": 0.07, "weight_decay": 0.0}
    groups[0] = {k: (v[:cut] if k in lists else v) for k, v in first.items()}
    optimizer = muon_dist.Muon([*groups, second], ns_dtype=torch.float32)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config(case, dist.get_world_size())
    )
    start = master(engine, optimizer)
    truth = Truth(start, optimizer)
    initial = {name: truth.options[name]["lr"] for name in truth.options}
    rates = []
    for step in range(4):
        rates.append([g["lr"] for g in optimizer.param_groups])
        backward(engine, step, 1)
        gradients = gradients_of(engine)
        engine.step()
        for name in truth.options:
            truth.options[name]["lr"] = initial[name] / (step + 1)
        truth.step(gradients)
    muon, adamw = errors(truth, master(engine, optimizer), start)
    engine.destroy()
    return muon, adamw, rates


def test_two_muon_groups_keep_their_own_lr_under_a_scheduler():
    cases = [Case(0), Case(0, "bf16"), Case(1), Case(2, "bf16"), Case(3, zero={"sub_group_size": 400})]
    for case, (muon, adamw, rates) in zip(cases, _in_one(_own_groups, cases), strict=True):
        assert muon < 1e-5 and adamw < 1e-4, (case, muon, adamw)
        assert rates[0] == [0.02, 3e-3, 3e-3, 0.07] and rates[3] == pytest.approx([r / 4 for r in rates[0]])


# Traps -------------------------------------------------------------------------------------------------------------


def _initialised(case: Case) -> tuple[float, int]:
    engine, optimizer = make_engine(case)
    found = master(engine, optimizer)
    given = {n: p.detach().bfloat16().float() for n, p in make_model(case.model).named_parameters()}
    moved = max((found[n] - given[n]).abs().max().item() for n in found)
    return moved, optimizer.orthogonalized


def test_the_step_inside_initialize_changes_nothing():
    """FP16_UnfusedOptimizer steps on zero gradients while it is built: weights x (1 - lr weight_decay) otherwise."""
    assert _in_one(_initialised, [Case(0, "bf16")]) == [(0.0, 0)]


def _half_weights(dtype: torch.dtype | None) -> list[str]:
    """What is said of an engine in float32 over a model that `zero.Init` made with `dtype`."""
    deepspeed.init_distributed("gloo", verbose=False)
    config = ds_config(Case(3), 1)
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    made = model[0].weight.ds_tensor.dtype
    said = []
    try:
        check_partitioned(model, config)
    except FrameworkError as error:
        said.append(str(error))
    optimizer = muon_dist.Muon([{"params": [p for p in model.parameters() if p.ds_shape.numel() > 8]}])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        muon_dist.attach(engine)
    said += [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert (made.itemsize < 4) == bool(said), (made, said)
    return said


def test_half_weights_that_zero_init_made_unasked_are_said():
    """On a CPU without fp16, DeepSpeed 0.19.8 makes bf16 weights of `dtype=torch.float32`; with fp16 it obeys."""
    assert run_ranks(_half_weights, 1, None) == [[]]
    (said,) = run_ranks(_half_weights, 1, torch.bfloat16 if why_no_fp16() is None else torch.float32)
    refused, warned = said
    assert (
        "zero.Init made 0.weight in torch.bfloat16, but the DeepSpeed configuration asks for torch.float32" in refused
    )
    assert "0.weight is torch.bfloat16, but the DeepSpeed configuration enables neither" in warned


def _with_use_muon(case: Case) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model(case.model)
    next(model.parameters()).use_muon = True
    optimizer = muon_dist.Muon(muon_dist.param_groups(model, lr=0.1))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case, 1))
    muon_dist.attach(engine)


def test_use_muon_on_a_parameter_is_refused():
    with pytest.raises(RankFailure, match=r"a `use_muon` attribute on model\.embed_tokens.weight"):
        run_ranks(_with_use_muon, 1, Case(1))


def _replaced(case: Case) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model(case.model)
    optimizer = torch.optim.AdamW(muon_dist.Muon(muon_dist.param_groups(model, lr=0.1)).param_groups, lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case, 1))
    muon_dist.attach(engine)


def test_a_replaced_optimizer_is_refused():
    with pytest.raises(RankFailure, match=r"FrameworkError: the engine steps AdamW, not muon_dist\.Muon"):
        run_ranks(_replaced, 1, Case(2))


def test_attach_takes_an_engine():
    with pytest.raises(FrameworkError, match="not Linear"):
        muon_dist.attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, 'has an "optimizer" block'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu_optimizer"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "AutoEP"),
    ],
)
def test_a_configuration_that_would_replace_muon_is_refused(config, message):
    with pytest.raises(FrameworkError, match=message):
        check_config(config)
    check_config({"zero_optimization": {"stage": 2}, "zero_force_ds_cpu_optimizer": False})


def _frozen_late(case: Case) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model(case.model)
    optimizer = muon_dist.Muon(muon_dist.param_groups(model, lr=0.1))
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case, 1))
    muon_dist.attach(engine)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_parameter_frozen_afterwards_is_named(stage):
    with pytest.raises(RankFailure, match=r"LayoutError: group 0: .*Freeze parameters before making Muon"):
        run_ranks(_frozen_late, 1, Case(stage))


def test_a_wrong_setting_of_zero_is_named_with_its_value() -> None:
    with pytest.raises(
        ConfigError, match=r"zero_optimization\.reduce_bucket_size: -3 is wrong: input should be"
    ) as told:
        check_zero_settings({"zero_optimization": {"stage": 1, "reduce_bucket_size": -3}})
    assert "pydantic" not in str(told.value)
