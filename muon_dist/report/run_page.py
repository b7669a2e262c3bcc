"""One self-contained HTML page of a run, made from the run folder; it makes no requests and has no script."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from muon_dist.audit.page import summary as audit_rows
from muon_dist.checkpoint.weights import Choice, choose_weights
from muon_dist.optim.diagnostics import place
from muon_dist.report import figures
from muon_dist.report.page import save, template
from muon_dist.report.run_record import Record, RunRecord, read_run

# (measure, title, meaning, logarithmic axis)
SPECTRA = (
    ("flatness", "Flatness", "mean over the largest singular value of the momentum", False),
    ("stable_rank", "Stable rank", "||G||_F^2 / ||G||_2^2 of the momentum", False),
    ("s_mean", "Mean singular value", "of the momentum, as it is orthogonalized", True),
    ("cosine", "Cosine to the polar factor", "of the orthogonalized update; 1 is exact", False),
    ("residual", "Residual", "||XX^T - I||_F / sqrt(r) of the orthogonalized update", False),
    ("max_deviation", "Largest deviation", "max |x_i - 1| of the update's singular values", False),
)
HEAT = "nuclear_rank_ratio"


def write_run_page(folder: str | Path, output: str | Path | None = None, choice: Choice | None = None) -> Path:
    """Write the page of a run folder (`report.html` in it unless `output` is given) and return its path.

    choice: the weights whose figures are at the top; None: the run's last weights.

    Raises:
        CheckpointError: the run does not have the chosen weights. DataError: the folder is not a run, or the page
            cannot be written.
    """
    record = read_run(folder)
    if choice is not None:
        record.chosen = choose_weights(record.root, choice)
    target = Path(output) if output is not None else record.root / "report.html"
    return save(render(record), target)


def render(record: RunRecord) -> str:
    """The page as text. Everything from the files is escaped; the figures are drawn here from their numbers."""
    filters = {"number": _number, "time": _time, "size": _size, "yaml": _yaml, "duration": _duration}
    heat, scale = figures.heat_maps("heat", record.spectra, HEAT, kinds(record))
    return template("run", share=lambda x: f"{x:.1%}", **filters).render(
        run=record,
        status=status(record),
        tiles=tiles(record),
        curves=curves(record),
        parts=parts(record),
        owners=owner_table(record),
        loads=load_figure(record),
        heat=heat,
        scale=scale,
        spectra=spectra_curves(record),
        latest=latest_spectra(record),
        timeline=timeline(record),
        audit=audit_rows(record.audit) if record.audit is not None else [],
    )


def status(record: RunRecord) -> str:
    """The run's status, in words: "finished" only if its summary says so."""
    steps = [e["steps"] for e in record.events if "steps" in e]
    last = max((line["step"] for line in record.metrics), default=None)
    if record.final is not None:
        return "finished"
    if last is None:
        return "no step was logged"
    return f"not finished: last logged at step {last:,}" + (f" of {steps[-1]:,}" if steps else "")


def tiles(record: RunRecord) -> list[tuple[str, str]]:
    """(label, figure) of the main results; without a summary, from the last log lines."""
    last_train: Record = record.training[-1] if record.training else {}
    last_eval: Record = record.evaluations[-1] if record.evaluations else {}
    summary: Record = record.final or {}
    weights, newest = record.chosen or record.weights, "newest weights" if record.chosen is None else "chosen weights"
    if record.chosen is not None:
        last_eval = next((line for line in reversed(record.evaluations) if line["step"] == record.chosen.step), {})
        # the summary's figures are those of other weights
        own = ("validation_loss", "validation_bits_per_byte", "weights_step")
        summary = {name: value for name, value in summary.items() if name not in own}
    bits = last_eval.get("eval_bits_per_byte")
    ended = last_eval.get("step") if record.chosen is not None else summary.get("steps", last_eval.get("step"))
    judged = summary.get("weights_step", ended)
    of_step = f" at step {judged:,}" if judged is not None else ""
    rates = [line["tokens_per_s"] for line in record.training if line.get("tokens_per_s")]
    start = next((e for e in record.events if "world_size" in e), {})
    found = [
        (f"validation loss{of_step}", summary.get("validation_loss", last_eval.get("eval_loss")), "{:.4f}"),
        (f"bits per byte{of_step}", summary.get("validation_bits_per_byte", bits), "{:.4f}"),
        ("training loss", last_train.get("loss"), "{:.4f}"),
        ("steps", summary.get("steps", last_train.get("step")), "{:,}"),
        (newest, weights.step if weights is not None else None, "step {:,}"),
        ("tokens", summary.get("tokens", last_train.get("tokens")), "{:,}"),
        ("tokens per second", summary.get("tokens_per_s", sum(rates) / len(rates) if rates else None), "{:,.0f}"),
        ("MFU", summary.get("mfu", last_train.get("mfu")), "{:.1%}"),
        ("processes", summary.get("world_size", start.get("world_size")), "{}"),
    ]
    return [(label, form.format(value)) for label, value, form in found if value is not None]


def curves(record: RunRecord) -> list[tuple[str, Markup]]:
    """(caption, figure) of loss, learning rates, throughput and gradient norms, if there are data."""
    train, evaluations = record.training, record.evaluations
    begun = [part["from_step"] for part in parts(record) if part["begun"]]
    marks = [c["step"] for c in record.checkpoints]
    wanted = [
        (
            "Loss, nats per token. Dotted lines: checkpoints on disk"
            + (". Lines with a number: a part of the curriculum begins" if begun else ""),
            figures.lines(
                "loss",
                {"training": figures.curve(train, "loss"), "validation": figures.curve(evaluations, "eval_loss")},
                ylabel="loss",
                description="training and validation loss over steps",
                marks=marks,
                parts=begun,
                dots=["validation"],
            ),
        ),
        ("Validation loss of each source", _keyed("sources", evaluations, "eval_loss/", "loss", parts=begun)),
        ("Learning rates", _keyed("lr", train, "lr/", "learning rate", zero=True, parts=begun)),
        (
            "Throughput of all ranks, evaluation and saving left out",
            figures.lines(
                "throughput",
                {"tokens per second": figures.curve(train, "tokens_per_s")},
                ylabel="tokens/s",
                description="tokens per second over steps",
                zero=True,
            ),
        ),
        ("Norm of the raw gradient", _keyed("norms", train, "grad_norm/", "norm", log=True)),
    ]
    return [(caption, figure) for caption, figure in wanted if figure is not None]


def _keyed(name: str, records: list[Record], prefix: str, ylabel: str, **style: Any) -> Markup | None:
    keys = list(dict.fromkeys(k for line in records for k in line if k.startswith(prefix)))
    series = {key.removeprefix(prefix): figures.curve(records, key) for key in keys}
    return figures.lines(name, series, ylabel=ylabel, description=f"{ylabel} of each over steps", **style)


def parts(record: RunRecord) -> list[Record]:
    """The parts of the curriculum after the first, in order: number (from 2), from_step, begun, and changes."""
    last = max((line["step"] for line in record.metrics), default=0)
    found = []
    given = record.setting("curriculum")
    known = [p for p in given if isinstance(p, dict) and "from_step" in p] if isinstance(given, list) else []
    for number, part in enumerate(known, start=2):
        about = ", ".join(f"{name} {value}" for name, value in _settings(part) if name != "from_step")
        start = part["from_step"]
        found.append({"number": number, "from_step": start, "begun": start < last, "about": about or "as before"})
    return found


def _settings(block: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of the settings of a block that are not empty."""
    for name, value in block.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        elif value is not None and (name, value) != ("warmup_steps", 0):
            yield f"{prefix}{name}", value


def kinds(record: RunRecord) -> list[str]:
    """The types of matrices that were measured, in the order of the model's parameters if it is known."""
    routes = (record.routing or {}).get("routes", [])
    order = list(dict.fromkeys(place(r["fqn"])[1] for r in routes))
    found = list(dict.fromkeys(r["type"] for r in record.spectra))
    return sorted(found, key=lambda kind: order.index(kind) if kind in order else len(order))


def short_names(types: Sequence[str]) -> list[str]:
    """The last part of each name if these parts differ, else the whole names."""
    last = [kind.rpartition(".")[2] for kind in types]
    return last if len(set(last)) == len(last) else list(types)


def owner_table(record: RunRecord) -> dict[str, Any] | None:
    """Owners by layer and type: {"types": [...], "rows": [(layer, [ranks of each type])]}; None without a plan."""
    if record.ownership is None:
        return None
    cells: dict[Any, dict[str, list[int]]] = {}
    for m in record.ownership["matrices"]:
        layer, kind = place(m["name"])
        cells.setdefault(layer, {}).setdefault(kind, []).append(m["owner"])
    order = sorted(cells, key=lambda layer: -1 if layer is None else layer)
    types = list(dict.fromkeys(place(m["name"])[1] for m in record.ownership["matrices"]))
    return {
        "types": short_names(types),
        "rows": [(layer, [sorted(set(cells[layer].get(kind, []))) for kind in types]) for layer in order],
    }


def load_figure(record: RunRecord) -> Markup | None:
    """Work of each rank in one optimizer step."""
    loads = (record.ownership or {}).get("loads") or []
    if not loads or len(loads) > 64:
        return None
    return figures.bars(
        "loads",
        [f"rank {r['rank']}" for r in loads],
        [r["flops"] / 1e9 for r in loads],
        xlabel="GFLOP of Newton-Schulz per step",
        description="orthogonalization work of each rank",
    )


def spectra_curves(record: RunRecord) -> list[tuple[str, str, Markup]]:
    """(title, meaning, figure) of each measure that was taken, with one curve per type of matrix."""
    found = []
    types = kinds(record)
    short = dict(zip(types, short_names(types), strict=True))
    for measure, title, meaning, log in SPECTRA:
        series = figures.by_type(record.spectra, measure)
        figure = figures.lines(
            f"spectra-{measure}",
            {short[kind]: series[kind] for kind in types if kind in series},
            ylabel=title.lower(),
            description=f"{title} by type of matrix over steps",
            log=log,
        )
        if figure is not None:
            found.append((title, meaning, figure))
    return found


def latest_spectra(record: RunRecord) -> list[Record]:
    """The newest measures of every matrix, in the order of their first measurement."""
    newest: dict[str, Record] = {}
    for line in record.spectra:
        newest[line["matrix"]] = line
    return sorted(newest.values(), key=lambda r: (r["layer"] is None, r["layer"] or 0, r["matrix"]))


def timeline(record: RunRecord) -> list[dict[str, Any]]:
    """Starts, resumptions, checkpoints and ends in order of time, with seconds since the first event."""
    sizes = {c["step"]: c for c in record.checkpoints}
    known = {e["step"] for e in record.events if e["event"] == "checkpoint"}
    rows = [dict(e) for e in record.events]
    # Runs of older versions have no events, but they have checkpoints.
    rows += [
        {"event": "checkpoint", "step": c["step"], "time": c["time"]}
        for c in record.checkpoints
        if c["step"] not in known and c["time"] is not None
    ]
    rows.sort(key=lambda e: e["time"])
    for row in rows:
        row["since"] = row["time"] - rows[0]["time"]
        row["note"] = _note(row, sizes)
    return rows


def _note(row: dict[str, Any], sizes: dict[int, Record]) -> str:
    if row["event"] == "checkpoint":
        kept = sizes.get(row["step"])
        if kept is None:
            return "no longer on disk"
        return _size(kept["bytes"]) + ("" if kept["finished"] else ", the save was cut off")
    if row["event"] in ("started", "resumed") and "world_size" in row:
        return f"{row['world_size']} processes, to step {row.get('steps', '?')}"
    return ""


def _number(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
