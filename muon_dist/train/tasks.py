"""Tasks of lm-evaluation-harness on a trained model, from files on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muon_dist.adapters.hf.callbacks import quiet_transformers
from muon_dist.checkpoint.weights import NEWEST, Choice
from muon_dist.errors import ConfigError, DataError
from muon_dist.failures import one_line
from muon_dist.model.load import load_model, load_text_tokenizer
from muon_dist.train.models import find_weights


def evaluate_tasks(
    path: str | Path, tasks: str | Path, *, batch_size: int = 8, limit: int | None = None, choice: Choice = NEWEST
) -> dict[str, Any]:
    """Scores of the model of a run, checkpoint or model folder: `model`, `step`, and task -> metric -> value.

    tasks: a YAML file of lm-evaluation-harness, or a folder of them. A task names its data (`dataset_path: json` with
    `data_files` for files on this machine). limit: use only this many documents per task, the first ones.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or there is no such file.
        DataError: lm-evaluation-harness refuses a task or its data.
    """
    files = _files(Path(tasks))
    try:
        from lm_eval import simple_evaluate  # seconds, and an extra
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness, which cannot be imported ({error}): pip install lm-eval"
        ) from error
    quiet_transformers()
    weights = find_weights(path, choice)
    model, tokenizer = load_model(weights.path), load_text_tokenizer(weights.path)
    longest = getattr(model.config, "max_position_embeddings", None)
    speaker = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
    try:
        manager = TaskManager(include_path=sorted({str(file.parent) for file in files}), include_defaults=False)
        found = simple_evaluate(
            speaker,
            tasks=[str(file) for file in files],
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
    except Exception as error:  # tasks, their data and their code may raise any error
        raise DataError(f"{tasks}: lm-evaluation-harness: {type(error).__name__}: {one_line(error)}") from error
    scores = {
        name: {key.partition(",")[0]: value for key, value in values.items() if isinstance(value, (int, float))}
        for name, values in found["results"].items()
    }
    return {"model": str(weights.path), "step": weights.step, "tasks": scores}


def _files(tasks: Path) -> list[Path]:
    if tasks.is_file():
        return [tasks]
    found = sorted(p for pattern in ("*.yaml", "*.yml") for p in tasks.glob(pattern)) if tasks.is_dir() else []
    if not found:
        raise ConfigError(f"--tasks {tasks}: no YAML file of a task there")
    return found
