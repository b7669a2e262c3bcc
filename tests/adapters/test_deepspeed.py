"""ZeRO 0-3 against the single-process truth: stages, dtypes, accumulation, ranks, models and engine options.

A covering subset, and under `slow` the whole product: `pytest -m slow tests/adapters/test_deepspeed.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.distributed import RankFailure, run_ranks

pytest.importorskip("deepspeed")

from tests.adapters.deepspeed_ranks import Case, Result, make_engine, run_cases

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

EXACT = 1e-5


def check(case: Case, by_rank: Iterable[Result]) -> None:
    """Update, momentum and Newton-Schulz calls of one case."""
    results = list(by_rank)
    for r in results:
        assert r.moved > 0.01, case
        if r.same_gradients is not None:
            assert r.same_gradients < EXACT, (case, r)
        if r.single_process is not None:
            assert r.single_process < EXACT, (case, r)
        if r.momentum is not None:
            assert r.momentum < EXACT, (case, r)
    for step in range(case.steps):
        assert sum(r.orthogonalized[step] for r in results) == results[0].matrices, (case, step)


def check_all(world: int, cases: list[Case], accessors: bool = True) -> None:
    by_rank = run_ranks(run_cases, world, cases, accessors, timeout=60.0 + 30 * len(cases))
    for i, case in enumerate(cases):
        check(case, [results[i] for results in by_rank])


def product(model: str, dtype: str) -> list[Case]:
    stages = range(1, 4) if dtype == "fp16" else range(4)
    return [Case(stage, dtype, accumulation, model) for stage in stages for accumulation in (1, 4)]


SUBSET = [
    pytest.param(1, [Case(s) for s in range(4)], marks=pytest.mark.slow),
    (2, [Case(s, "fp32", 4) for s in range(4)]),
    pytest.param(2, [Case(s, "bf16") for s in range(4)], marks=pytest.mark.slow),
    pytest.param(2, [Case(s, "fp16", 4) for s in (1, 2, 3)], marks=pytest.mark.fp16),
    pytest.param(
        2,
        [*(Case(s, model="gpt2") for s in (0, 2, 3)), *(Case(s, model="mixtral") for s in (1, 3))],
        marks=pytest.mark.slow,
    ),
    (4, [Case(0, model="gpt2"), Case(1, "bf16", 4), Case(2), Case(3, "fp32", 4), Case(3, "bf16", model="mixtral")]),
]


@pytest.mark.parametrize(("world", "cases"), SUBSET, ids=lambda v: v if isinstance(v, int) else f"{len(v)}cases")
def test_equals_the_single_process_truth(world, cases):
    check_all(world, cases)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.fp16)])
@pytest.mark.parametrize("model", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_whole_product(world, model, dtype):
    check_all(world, product(model, dtype))


OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
OPTIONS = {
    "stage1": [
        Case(1, zero={"overlap_comm": True, "contiguous_gradients": False}),
        Case(1, zero={"reduce_bucket_size": 500, "allgather_bucket_size": 512}),
        Case(1, zero=OFFLOAD),
        Case(1, "bf16", 4, config=BF16_OPTIMIZER),
        Case(1, "bf16", model="gpt2", config=BF16_OPTIMIZER, attach=True),
    ],
    "stage2": [
        Case(2, zero={"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 500}),
        Case(2, zero={"parameter_alignment": True}),
        Case(2, "bf16", 4, zero=OFFLOAD),
        Case(2, "bf16", 4, config=BF16_OPTIMIZER),
        Case(2, muon={"bucket_mb": 0.002}, attach=True),
    ],
    "stage3": [
        Case(3, zero={"sub_group_size": 300, "overlap_comm": True}),
        Case(3, "bf16", 4, zero={**OFFLOAD, "sub_group_size": 500}),
    ],
    "stage3 too": [
        Case(3, zero={"sub_group_size": 20000, "reduce_bucket_size": 2000, "stage3_prefetch_bucket_size": 1000}),
        Case(3, zero={"stage3_param_persistence_threshold": 1000, "reduce_scatter": False}),
        Case(3, zero_init=True, attach=True),
        Case(3, zero={**OFFLOAD, "offload_param": {"device": "cpu", "pin_memory": False}}),
    ],
    "owners": [
        Case(0, muon={"owner_policy": "round_robin", "bucket_mb": 0.002}),
        Case(2, muon={"owner_policy": "round_robin"}),
        Case(3, muon={"owner_policy": "local", "bucket_mb": 0.002}),
    ],
}


@pytest.mark.parametrize(
    "name",
    ["stage3", "owners", *(pytest.param(n, marks=pytest.mark.slow) for n in ("stage1", "stage2", "stage3 too"))],
)
def test_engine_options(name):
    check_all(2, OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_engine_options_on_other_ranks(name, world):
    check_all(world, [c for c in OPTIONS[name] if world != 3 or c.accumulation == 1])


def test_round_robin_gradients():
    """DeepSpeed's accessors go wrong here (`_hp_mapping` of most parameters), so only a process of its own judges."""
    cases = [Case(s, zero={"round_robin_gradients": True}) for s in (1, 2)]
    check_all(2, cases, accessors=False)


def _refused(case: Case) -> None:
    engine, _ = make_engine(case)
    from tests.adapters.deepspeed_ranks import backward

    backward(engine, 0, 1)
    engine.step()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        pytest.param(Case(0, "fp16"), "fp16 at stage 0", marks=pytest.mark.fp16),
        (Case(1, zero={"elastic_checkpoint": True}), "elastic_checkpoint"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(case, message):
    with pytest.raises(RankFailure, match=f"FrameworkError: .*{message}"):
        run_ranks(_refused, 2, case)
