"""The other points: NaN, plans, data; and points that other tests cover, which are run or looked up here."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from muon_dist.data.sampler import MixtureSampler
from muon_dist.errors import NonFiniteError, PlanMismatchError
from muon_dist.optim import Muon
from tests.faults.processes import launch
from tests.faults.table import Count
from tests.optim.test_guard import end_of_run, places, poison_places
from tests.optim.test_muon import make_groups, make_parameters

ROOT = Path(__file__).resolve().parent.parent.parent
WORLD = 4


# 8 ------------------------------------------------------------------------------------------------------------------


def not_finite(count: int) -> Count:
    """Point 8: NaN or inf on one rank at `count` places; then three in a row end the run."""
    out = Count()
    outcomes = launch(poison_places, WORLD, places(count))
    for rank, outcome in enumerate(outcomes):
        if outcome.value is None:
            out.fail(f"rank {rank}: exit {outcome.code}: {outcome.error[-500:]}")
            return out
    for place, rows in zip(places(count), zip(*(o.value for o in outcomes), strict=True), strict=True):
        out.add(all(row == (True, True, True) for row in rows), f"{place}: {rows}")
    for sharded in (False, True):
        ends = launch(_end, WORLD, sharded)
        good = all(o.code == NonFiniteError.exit_code and "on rank 2" in o.error for o in ends)
        out.add(good, f"three in a row: {[o.code for o in ends]} {ends[0].error[-300:]}")
    return out


def _end(sharded: bool) -> None:
    raise NonFiniteError(end_of_run(sharded))


# 10 -----------------------------------------------------------------------------------------------------------------

MUTATIONS = {
    "bucket_mb": "bucket_mb in bytes",
    "ns_steps": "Newton-Schulz",
    "ns_schedule": "Newton-Schulz",
    "ns_dtype": "Newton-Schulz",
    "wire_dtype": "wire_dtype",
    "owner_policy": "owner policy",
    "momentum": "momentum, nesterov, scale",
    "nesterov": "momentum, nesterov, scale",
    "scale": "momentum, nesterov, scale",
    "lr": "lr, weight_decay",
    "weight_decay": "lr, weight_decay",
    "missing": "number of matrices",
    "shape": "shape",
    "order": "shape",
    "cut": "number of matrices",
    "name": "name|wide|tall",
}
_VALUES = {
    "bucket_mb": 1.0,
    "ns_steps": 4,
    "ns_schedule": "cans",
    "ns_dtype": torch.bfloat16,
    "wire_dtype": torch.bfloat16,
    "owner_policy": "round_robin",
    "momentum": 0.9,
    "nesterov": False,
    "scale": "spectral",
    "lr": 0.01,
    "weight_decay": 0.0,
}


def _mutated(change: str) -> None:
    """One step in which rank 2 was made differently."""
    odd = dist.get_rank() == 2
    parameters = make_parameters()
    options = {"lr": 0.02}
    if odd and change in _VALUES:
        options[change] = _VALUES[change]
    if odd and change == "missing":
        del parameters["heads"]
    if odd and change == "shape":
        parameters["wide"] = torch.nn.Parameter(torch.randn(32, 64))
    if odd and change == "order":
        parameters = dict(reversed(parameters.items()))
    if odd and change == "name":
        parameters = {("tall2" if n == "tall" else n): p for n, p in parameters.items()}
    groups = make_groups(parameters)
    if odd and change == "cut":
        groups[0]["cuts"][list(parameters).index("heads")] = {"heads": 2}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = Muon(groups, **options)
    try:
        optimizer.step()
    finally:
        assert all(torch.equal(p, before[n]) for n, p in parameters.items()), "touched before it was refused"


# One mutation for each field that a message names.
ONE_OF_EACH_FIELD = ("bucket_mb", "ns_schedule", "wire_dtype", "owner_policy", "momentum", "lr", "cut", "shape")


def mutations(changes: Iterable[str] = tuple(MUTATIONS)) -> Count:
    """Point 10: refused by all ranks before anything is sent; the field is named."""
    out = Count()
    for change in changes:
        field = MUTATIONS[change]
        began = time.time()
        outcomes = launch(_mutated, WORLD, change)
        seconds = max(o.ended for o in outcomes) - began
        named = all(re.search(field, o.error) for o in outcomes)
        codes = {o.code for o in outcomes}
        good = codes == {PlanMismatchError.exit_code} and named and seconds < 5
        out.add(good, f"{change}: exits {codes} after {seconds:.1f} s: {outcomes[0].error[-300:]}")
    return out


# 15 -----------------------------------------------------------------------------------------------------------------


def data_positions(count: int, seed: int = 15) -> Count:
    """Point 15, its second half: resume in the middle of an epoch at `count` positions, at other numbers of ranks."""
    sizes, weights, total = [101, 53, 7], [3.0, 2.0, 1.0], 480
    whole = list(MixtureSampler(sizes, weights, seed=1, total=total))
    out, chooser = Count(), random.Random(seed)
    for _ in range(count):
        consumed = chooser.randrange(1, total)
        sampler = MixtureSampler(sizes, weights, seed=1, total=total)
        sampler.set_consumed(consumed)
        out.add(whole[:consumed] + list(sampler) == whole, f"resumed at {consumed}")
    return out


# Covered by other tests -------------------------------------------------------------------------------------

RESHARD_POINTS = ("tests/checkpoint/test_reshard.py::test_points",)
RESHARD_SWEEP = ("tests/checkpoint/test_reshard.py::test_sweep",)
REFERENCE = (
    "tests/optim/test_distributed.py::test_replicated_equals_reference_and_ranks_are_identical",
    "tests/optim/test_distributed.py::test_flat_shards_equal_reference",
    "tests/optim/test_distributed.py::test_gathered_matrices_are_exact",
    "tests/layout/test_flat.py::test_integers_move_bit_exactly",
    "tests/layout/test_per_parameter.py::test_integers_move_bit_exactly",
    "tests/layout/test_dtensor.py::test_integers_move_bit_exactly",
    "tests/optim/test_muon.py::test_accumulated_gradients_are_one_update",
    "tests/adapters/test_fsdp2.py::test_equals_one_process_with_exact_calls_and_bytes",
    "tests/adapters/test_deepspeed.py::test_equals_the_single_process_truth",
    "tests/adapters/test_deepspeed_failures.py::test_momentum_and_newton_schulz_exist_once",
)
MISSING = (
    "tests/optim/test_distributed.py::test_gradient_missing_on_all_ranks_is_no_update_and_no_hang",
    "tests/optim/test_distributed.py::test_gradient_missing_on_one_rank_counts_as_zero_there",
    "tests/adapters/test_fsdp2.py::test_frozen_parameters_and_missing_gradients",
    "tests/optim/test_muon.py::test_no_gradient_means_untouched_and_zero_gradient_means_decay_only",
    "tests/faults/test_bad_input.py::test_an_expert_that_saw_no_token",
)
DATA = (
    "tests/data/test_dataset.py::test_damaged_shard_is_named_with_its_offset",
    "tests/data/test_dataset.py::test_damage_is_located_by_block",
    "tests/data/test_sampler.py::test_resume_repeats_and_misses_nothing_at_another_number_of_ranks",
    "tests/data/test_sampler.py::test_resume_across_blocks",
)
# Row of the table of bad input -> its tests.
BAD_INPUT = {
    "malformed YAML, unknown or duplicate key, wrong type": (
        "tests/test_cli.py::test_malformed_yaml",
        "tests/test_cli.py::test_unknown_and_duplicate_keys_all_at_once",
        "tests/test_cli.py::test_bad_override",
        "tests/config/test_load.py::test_all_errors_at_once_with_lines_and_closest_keys",
    ),
    "contradictory settings": (
        "tests/test_cli.py::test_contradiction",
        "tests/config/test_validate.py::test_contradictions_name_both_keys",
    ),
    "fp32, bf16, fp16 gradients": ("tests/faults/test_bad_input.py::test_gradients_of_any_dtype",),
    "empty, too short or non-UTF-8 data": (
        "tests/test_cli.py::test_empty_data",
        "tests/test_cli.py::test_text_that_is_not_utf8",
        "tests/test_cli.py::test_data_too_short_for_one_sample",
    ),
    "vocabulary mismatch": (
        "tests/data/test_dataset.py::test_vocabulary_of_the_model_is_checked_before_training",
        "tests/test_cli.py::test_tokens_of_another_tokenizer_are_made_again",
    ),
    "1-D parameter sent to Muon": (
        "tests/test_cli.py::test_vector_sent_to_muon",
        "tests/test_routing.py::test_vector_sent_to_muon_is_refused_with_the_table",
    ),
    "no parameter reaches Muon": ("tests/test_cli.py::test_nothing_reaches_muon",),
    "zero matrix": ("tests/faults/test_bad_input.py::test_a_zero_matrix_only_decays",),
    "rank-deficient momentum": ("tests/faults/test_bad_input.py::test_momentum_of_deficient_rank",),
    "ranks not dividing a size, empty shards, [1, N] and [N, 1]": (
        "tests/layout/test_dtensor.py::test_eighteen_rows_on_eight_ranks_leave_two_empty",
        "tests/layout/test_per_parameter.py::test_a_vector_of_three_on_eight_ranks_lies_on_the_first_three",
        "tests/optim/test_distributed.py::test_flat_shards_equal_reference",
    ),
    "tied embeddings": ("tests/test_routing.py::test_tied_weights_are_listed_once",),
    "frozen parameters": (
        "tests/test_routing.py::test_frozen_parameters_are_listed_and_left_out",
        "tests/optim/test_muon.py::test_frozen_parameters_are_out_of_the_groups",
    ),
    "gradient None on one rank, on all": MISSING[:2],
    "3-D expert weights": (
        "tests/test_routing.py::test_experts_are_batches_of_matrices",
        "tests/layout/test_fragments.py::test_experts_are_a_batch_and_may_be_cut_further",
    ),
}
HOSTILE = (
    "tests/checkpoint/test_damage.py::test_nothing_pickled_is_ever_read",
    "tests/checkpoint/test_damage.py::test_names_outside_of_the_folder_are_refused",
    "tests/checkpoint/test_damage.py::test_links_are_refused",
    "tests/config/test_load.py::test_tags_that_make_objects_are_refused",
    "tests/config/test_load.py::test_names_that_leave_the_run_folder",
    "tests/config/test_load.py::test_saved_configuration_holds_no_secret",
    "tests/config/test_redact.py::test_environment",
    "tests/train/test_parts.py::test_no_secret_reaches_the_environment_file",
    "tests/data/test_corpus.py::test_links",
    "tests/data/test_corpus.py::test_dataset_scripts_are_not_run",
)


def look_up(names: tuple[str, ...]) -> Count:
    """That these tests exist, where the test suite itself runs them."""
    out = Count()
    for name in names:
        file, _, test = name.partition("::")
        path = ROOT / file
        out.add(path.is_file() and f"def {test}(" in path.read_text("utf-8"), f"{name} is gone")
    return out


def run_tests(names: tuple[str, ...], *options: str) -> Count:
    """Run tests in a separate pytest process and count their cases."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, f"--basetemp={folder}/t"]
        found = subprocess.run(
            [*command, *names], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    passed, failed = (sum(map(int, re.findall(rf"(\d+) {word}", found.stdout))) for word in ("passed", "failed"))
    out = Count(passed + failed, passed, re.findall(r"^FAILED (\S+)", found.stdout, re.MULTILINE))
    if found.returncode not in (0, 1) or not passed:
        out.fail(f"pytest ended with {found.returncode}: {(found.stdout + found.stderr)[-500:]}")
    return out


def bad_input() -> tuple[str, ...]:
    """All tests of the rows of bad input."""
    return tuple(dict.fromkeys(name for names in BAD_INPUT.values() for name in names))
