"""Trainer callbacks for the log: a metrics file for programs, and lines (with a progress bar) for people."""

from __future__ import annotations

import datetime
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from muon_dist.adapters.hf.flow import RunRecord
from muon_dist.json_files import append_line, keep_lines


class MetricsFile(RunRecord):
    """Appends Trainer's log to a JSON-lines file, on the first rank: `step`, `time` (seconds since 1970), figures.

    On resume it deletes the lines after the checkpoint's step, so that each step is in the file once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin_run(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        done = state.global_step
        keep_lines(self.path, lambda line: done > 0 and isinstance(line.get("step"), int) and line["step"] <= done)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        append_line(self.path, {"step": state.global_step, "time": round(time.time(), 3), **logs})


class AttachDeepSpeed(TrainerCallback):
    """Makes the plan for DeepSpeed's tensors before the first step, so that unsupported settings fail early.

    At stage 0 in fp32, Muon's gradients are exempt from DeepSpeed's clip only with this callback.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            from muon_dist.adapters.deepspeed import attach  # imports DeepSpeed, so only where it is used

            attach(self.trainer.deepspeed)


class Console(TrainerCallback):
    """Prints one line per log entry on the first rank, and a progress bar in a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._first: tuple[int, float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first = None
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._first is None:  # the first step is slower: it allocates memory, loads kernels and makes plans
            self._first = state.global_step, time.perf_counter()
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = log_line(logs, state.global_step, state.max_steps, self._left(state))
        if line is None:
            return
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def _left(self, state: Any) -> float | None:
        """Estimated seconds until the last step, from the time since this process's first step, pauses included."""
        if self._first is None or state.global_step <= self._first[0]:
            return None
        pace = (time.perf_counter() - self._first[1]) / (state.global_step - self._first[0])
        return pace * (state.max_steps - state.global_step)


def log_line(logs: dict[str, Any], step: int, steps: int, left: float | None = None) -> str | None:
    """One log entry as a line for people; None for an entry that only programs need.

    left: seconds until the last step.
    """
    place = f"step {step:>{len(str(steps))}}/{steps}"
    if "loss" in logs:
        parts = [place, f"loss {logs['loss']:.4f}"]
        _add(parts, logs, "bits_per_byte", "bits/byte {:.4f}")
        _add(parts, logs, "grad_norm", "grad norm {:.3g}")
        rates = {name.removeprefix("lr/"): rate for name, rate in logs.items() if name.startswith("lr/")}
        parts += ["lr " + " ".join(f"{name} {rate:.3g}" for name, rate in rates.items())] if rates else []
        _add(parts, logs, "tokens_per_s", "{:,.0f} tokens/s")
        _add(parts, logs, "mfu", "MFU {:.1%}")
        if left is not None and step < steps:
            parts.append(f"{100 * step // steps}%, {datetime.timedelta(seconds=round(left))} left")
        return "  ".join(parts)
    if "eval_loss" in logs:
        parts = [place, f"validation loss {logs['eval_loss']:.4f}"]
        _add(parts, logs, "eval_bits_per_byte", "bits/byte {:.4f}")
        _add(parts, logs, "eval_perplexity", "perplexity {:.2f}")
        return "  ".join(parts)
    return None


def _add(parts: list[str], logs: dict[str, Any], name: str, form: str) -> None:
    if logs.get(name) is not None:
        parts.append(form.format(float(logs[name])))


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and warnings; its errors stay.

    Also turns off the deprecation warning that DeepSpeed's use of old collectives causes in every step.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
