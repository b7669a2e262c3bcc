"""Cases are left out of a short run only where each value of each parameter stays."""

from __future__ import annotations

import itertools

from tests.choice import each_choice


def test_each_value_occurs() -> None:
    cases = [dict(zip("abc", of, strict=True)) for of in itertools.product(range(5), range(3), range(2))]
    chosen = each_choice(cases)
    assert len(chosen) == 5
    for name, count in zip("abc", (5, 3, 2), strict=True):
        assert {cases[i][name] for i in chosen} == set(range(count))


def test_values_that_occur_with_few_others() -> None:
    cases = [{"layout": "ddp", "rule": "muon"}, {"layout": "ddp", "rule": "namo"}, {"layout": "tp", "rule": "muon"}]
    assert each_choice([*cases, {"layout": "tp", "rule": "namo"}]) == [0, 3]
    assert each_choice(cases) == [0, 1, 2]
    assert each_choice([{}]) == []
    assert each_choice([]) == []
