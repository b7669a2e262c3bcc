"""What we touch of the Trainer's private parts is still there, still of that signature, and still called."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments, trainer

import muon_dist
from muon_dist import MuonTrainer
from muon_dist.adapters.hf.private import CALLED, OVERRIDDEN, PrivateTrainer, check_private, use_one_gpu
from muon_dist.errors import FrameworkError
from tests.adapters.hf.test_trainer import Words, arguments, make_model

# name -> its parameters, and the Trainer methods that call it; a change of transformers in either is a change for us
PARTS: dict[str, tuple[list[str], set[str]]] = {
    "_get_train_sampler": (["train_dataset"], {"get_train_dataloader"}),
    "_get_grad_norm": (["model", "grad_norm"], {"_run_epoch"}),
    "_save_checkpoint": (["model", "trial"], {"_maybe_log_save_evaluate"}),
    "_load_from_checkpoint": (["resume_from_checkpoint", "model"], {"train", "_prepare_for_training"}),
    "_prepare_for_training": (["max_steps", "train_dataloader", "resume_from_checkpoint"], {"_inner_training_loop"}),
    "_load_rng_state": (["checkpoint"], {"_run_epoch"}),
    "_load_best_model": ([], {"_finalize_training"}),
    "_finalize_training": (["trial", "num_train_samples", "start_time"], {"_inner_training_loop"}),
    "_get_output_dir": (["trial"], {"_save_checkpoint", "_finalize_training"}),
    "_prepare_inputs": (["inputs"], {"training_step", "prediction_step"}),
}
METHODS = {
    node.name: node
    for node in next(
        c for c in ast.parse(inspect.getsource(trainer)).body if isinstance(c, ast.ClassDef) and c.name == "Trainer"
    ).body
    if isinstance(node, ast.FunctionDef)
}


def uses(node: ast.AST) -> set[str]:
    """Names x of `self.x` in the source of a method."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    }


@pytest.fixture(scope="module")
def reached() -> set[str]:
    """The methods of Trainer that `train` and `evaluate` come to."""
    found, ahead = set(), {"train", "evaluate"}
    while ahead:
        found |= ahead
        ahead = {name for method in ahead for name in uses(METHODS[method]) if name in METHODS} - found
    return found


def test_every_private_part_is_listed() -> None:
    assert set(PARTS) == {*OVERRIDDEN, *CALLED}
    assert {name for name in vars(PrivateTrainer) if name in METHODS and name.startswith("_")} - {"__init__"} == {
        *OVERRIDDEN
    }


@pytest.mark.parametrize("name", PARTS)
def test_it_is_there_with_its_signature_and_called(name: str, reached: set[str]) -> None:
    parameters, callers = PARTS[name]
    assert name in METHODS, f"transformers: Trainer.{name} is gone"
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters, f"Trainer.{name} has changed"
    calling = {method for method in reached if name in uses(METHODS[method])}
    assert callers <= calling, f"Trainer.{name} is no longer called by {sorted(callers - calling)}"


def test_the_attributes(tmp_path: Path) -> None:
    made = MuonTrainer(make_model(), arguments(tmp_path), train_dataset=Words())
    assert made.micro_batch_size == made._train_batch_size == made.args.train_batch_size
    assert "_train_batch_size" in uses(METHODS["get_train_dataloader"]), "the loader's batch has another name"
    args = arguments(tmp_path)
    args._n_gpu = 2
    use_one_gpu(args)
    assert args.n_gpu == 1 and "self._n_gpu" in inspect.getsource(TrainingArguments.n_gpu.fget)


def test_no_other_file_touches_a_private_part() -> None:
    """Attributes and methods of Trainer's own that begin with `_`, in the files that hold or use a trainer."""
    private = {name for name in METHODS if name.startswith("_") and not name.startswith("__")}
    private |= set(re.findall(r"self\.(_\w+)\b.* = ", inspect.getsource(Trainer))) | {"_n_gpu"}
    package = Path(muon_dist.__file__).parent
    files = [*package.glob("adapters/hf/**/*.py"), *package.glob("train/*.py")]
    assert len(files) > 20
    for path in (p for p in files if p.name != "private.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", None) or (node.name if isinstance(node, ast.FunctionDef) else None)
            assert name not in private, f"{path.name}:{node.lineno} touches Trainer's {name}: use hf/private.py"  # type: ignore[attr-defined]


def test_a_training_calls_each_of_them_in_order(tmp_path: Path) -> None:
    """Our public methods behind the overrides, as a run of one save, and one that goes on, come to them."""
    names = (
        "training_order", "restore", "restore_rank", "clip_gradients", "write_checkpoint", "finish_saves",
        "load_best_weights",
    )  # fmt: skip
    calls: list[str] = []

    def noted(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(MuonTrainer, name)(self, *args, **kwargs)

        return call

    noting: Any = type("Noting", (MuonTrainer,), {name: noted(name) for name in names})
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    for steps, resume in ((2, None), (3, True)):
        args = arguments(tmp_path, max_steps=steps, load_best_model_at_end=True, **changes)
        noting(make_model(), args, train_dataset=Words(), eval_dataset=Words()).train(resume_from_checkpoint=resume)
    first = ["training_order", "restore", "restore_rank", "clip_gradients", "clip_gradients", "write_checkpoint"]
    end = ["finish_saves", "load_best_weights"]
    again = [name for name in calls if name != "restore_rank"]  # Trainer also asks for it when it has skipped batches
    assert [n for n in first if n != "restore_rank"] + end == again[: len(first) - 1 + len(end)]
    assert again[len(first) - 1 + len(end) :][:3] == ["training_order", "restore", "clip_gradients"]
    assert "restore_rank" in calls and again[-2:] == end


def test_a_version_without_one_is_refused() -> None:
    class Older:
        _get_train_sampler = _get_grad_norm = _save_checkpoint = _load_from_checkpoint = len
        _load_rng_state = _load_best_model = _finalize_training = _get_output_dir = _prepare_inputs = len

    with pytest.raises(FrameworkError, match=r"its Trainer has no _prepare_for_training, which MuonTrainer needs"):
        check_private(Older)
    check_private(Trainer)
