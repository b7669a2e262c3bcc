"""The fuzzer: its cases are right, and mistakes made on purpose are found, shrunk and replayed."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("deepspeed")

from muon_dist.errors import ConfigError
from muon_dist.fuzz.case import Case
from muon_dist.fuzz.draw import draw
from muon_dist.fuzz.judge import RIGHT, WRONG, Judge
from muon_dist.fuzz.run import command, fuzz
from tests import fuzz_mutations

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]

SECONDS = float(os.environ.get("MUON_DIST_FUZZ_SECONDS", "20"))
"""Seconds during which new cases are begun. `.ci/extended slow` sets 60."""


def test_a_case_survives_its_text() -> None:
    for number in range(300):
        case = draw(3, number)
        assert case.problem() is None
        assert Case.from_json(case.to_json()) == case


@pytest.mark.parametrize("text", ["", "[]", '{"step":3}', '{"steps":1}', '{"parameters":[{"name":"p"}]}'])
def test_a_text_that_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--replay is not a case"):
        command(1, 0, None, text, print)


# Each was wrong or refused when the fuzzer found it.
FOUND = [
    # all DTensors are AdamW's
    '{"seed":939,"parameters":[{"name":"p0","shape":[16,16]},{"name":"p1","shape":[12],"kind":"adamw","tp":0}],'
    '"setup":{"framework":"fsdp2","tp":2}}',
    # NorMuon with a plain parameter beside DTensors
    '{"seed":646,"parameters":[{"name":"p0","shape":[5,3]},{"name":"p1","shape":[8,5],"tp":0}],'
    '"setup":{"framework":"fsdp2","tp":2},"rule":"normuon"}',
    # a parameter of fewer rows than ranks, and the step of another
    '{"seed":960,"steps":2,"parameters":[{"name":"p2","shape":[3,8]},{"name":"p3","shape":[1],"kind":"adamw"},'
    '{"name":"p4","shape":[4],"kind":"adamw"}],"setup":{"framework":"fsdp2","shard":2},'
    '"resume":{"at":1,"how":"checkpoint"}}',
    # norms on a part of the mesh
    '{"seed":1,"steps":3,"parameters":[{"name":"p0","shape":[8,6],"tp":1},{"name":"p1","shape":[5],"kind":"adamw"},'
    '{"name":"p2","shape":[4,4]}],"setup":{"framework":"fsdp2","shard":2,"tp":2},'
    '"resume":{"at":2,"how":"checkpoint","setup":{"framework":"fsdp2","shard":2,"tp":2}}}',
    # a step of AdamW's group alone
    '{"seed":883,"parameters":[{"name":"p1","shape":[7,8]},{"name":"p3","shape":[8,1],"kind":"adamw"}],'
    '"setup":{"framework":"zero","stage":1}}',
    # copies over the tensor-parallel ranks, whose gradients FSDP2 adds in buckets of two sizes
    '{"seed":39,"steps":5,"parameters":[{"name":"p0","shape":[7,1],"layer":1,"group":1,"tp":0},{"name":"p1",'
    '"shape":[24,5],"layer":1,"transposed":true},{"name":"p2","shape":[7,1],"group":1}],"setup":{"framework":"fsdp2",'
    '"shard":3,"tp":2},"accumulation":2}',
    # SOAP divides an element by its own size that is nearly zero: rounding decides it, and the judge has to know
    '{"seed":700,"steps":3,"parameters":[{"name":"p2","shape":[3,3]}],"rule":"soap_muon","zero":[[2,"p2",-1]]}',
    # SOAP's covariance is singular: three references with noise may draw too little of it, so the judge draws more
    '{"seed":773,"steps":5,"parameters":[{"name":"p0","shape":[2,2],"layer":1},{"name":"p1","shape":[24,24],'
    '"heads":8,"transposed":true,"fsdp_dim":1},{"name":"p2","shape":[3,8],"layer":1,"sizes":[5,3],'
    '"transposed":true,"fsdp_dim":1},{"name":"p3","shape":[3,3],"layer":2,"tp":1},{"name":"p4","shape":[7],'
    '"kind":"adamw","layer":2,"tp":0},{"name":"p5","shape":[5],"kind":"adamw","layer":1}],'
    '"setup":{"framework":"fsdp2","shard":2},"rule":"soap_muon","weight_decay":0.0,"momentum":0.5,'
    '"nesterov":false,"scale":"unit_rms","rule_options":[["beta2",0.8]],"ns_steps":3,"bucket_mb":0.001,'
    '"clip":20.0,"resume":{"at":4,"how":"checkpoint","setup":{"framework":"fsdp2","shard":2}}}',
]


def test_what_it_has_found_is_mended() -> None:
    with Judge() as judge:
        for text in FOUND:
            outcome = judge.run(Case.from_json(text))
            assert outcome.kind == RIGHT, (text, outcome)


def test_nothing_is_wrong() -> None:
    said: list[str] = []
    report = fuzz(SECONDS, 1, said.append)
    assert not report.wrong, "\n".join(said)
    assert report.counts[RIGHT] >= 5 and not report.refusals, report.table()


@pytest.mark.parametrize(
    "name",
    ["dropped_copy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("missing_nesterov", "other_rate"))],
)
def test_a_mistake_is_found_and_shrunk(name: str) -> None:
    mutation = getattr(fuzz_mutations, name)
    report = fuzz_mutations.find(mutation, seed=0, shrink_seconds=4.0)
    (wrong,) = report.wrong
    assert len(wrong.case.to_json()) < len(wrong.drawn.to_json())
    with Judge(mutation) as judge:
        assert judge.run(wrong.case).kind == WRONG
    with Judge() as judge:
        assert judge.run(wrong.case).kind == RIGHT
