"""The panels of each experiment. A panel reads the result's file."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from muon_dist.experiments.figure_tools import COLOURS, THEORY, Panel, horizontal_bars, number, over_seeds, stats
from muon_dist.experiments.training import LABELS


def e1_law(ax: Axes, record: dict[str, Any]) -> None:
    for (kappa, points), colour in zip(
        record["data"]["points"].items(), ("#1f5fa8", "#3d9a8b", "#c9962b"), strict=False
    ):
        slope = record["data"]["fits"][kappa]["muon"]["slope_mean"]
        label = f"kappa {kappa}: slope {slope['mean']:.3f} ± {slope['sd']:.3f}"
        ax.scatter(points["s_mean"], points["eta"], s=5, alpha=0.5, color=colour, label=label)
    ends = [min(points["s_mean"]), max(points["s_mean"])]
    ax.plot(ends, [2 * e for e in ends], **THEORY, label="theory at kappa 1, bound above: (2/L) s_mean")
    ax.set(xscale="log", yscale="log", xlabel="mean singular value of G", ylabel="exact stable step")
    ax.legend()


def e1_multiples(ax: Axes, record: dict[str, Any]) -> None:
    multiples = record["data"]["multiples"]
    seeds = zip(*([r["increases"] / r["steps"] for r in rows] for rows in multiples.values()), strict=True)
    ax.errorbar([float(c) for c in multiples], **over_seeds(list(seeds)), fmt="o", color=COLOURS["muon"], capsize=3)
    ax.step([0.9, 2.0, 2.2], [0, 0, 1], where="pre", **THEORY, label="theory: threshold at c = 2")
    ax.set(xlabel="c, in eta = c s_mean / L", ylabel="share of steps that increase f")
    ax.legend()


def e1_residual(ax: Axes, record: dict[str, Any]) -> None:
    rows = [[r for r in seed if r["schedule"] == "keller"] for seed in record["data"]["ablation"]]
    counts = [r["steps"] for r in rows[0]]
    ax.errorbar(counts, **over_seeds([[r["simulated"] for r in seed] for seed in rows]), fmt="o", capsize=3,
                color=COLOURS["muon"], label="stable step, measured / exact polar")  # fmt: skip
    ax.plot(counts, [r["predicted"] for r in rows[0]], **THEORY, label="theory: r sum(s x) / (sum(s) sum(x^2))")
    ax.errorbar(counts, **over_seeds([[r["residual"] for r in seed] for seed in rows]), fmt="s", capsize=3,
                color=COLOURS["sgd"], label="residual ||XX^T - I|| / sqrt(r)")  # fmt: skip
    ax.set(xlabel="Keller iterations", yscale="log")
    ax.legend()


def e2_regression(ax: Axes, record: dict[str, Any]) -> None:
    thresholds = list(record["data"]["thresholds"].values())
    scales = [float(s) for s in thresholds[0]]
    for arm, power in (("sgd", -2), ("muon", -1)):
        series = over_seeds([[row[arm] for row in seed.values()] for seed in thresholds])
        ax.errorbar(scales, **series, fmt="o", color=COLOURS[arm], capsize=3, label=LABELS[arm])
        anchor = series["y"][scales.index(1.0)]
        label = f"theory: slope {power}"
        ax.plot(scales, [anchor * s**power for s in scales], **(THEORY | {"color": COLOURS[arm]}), label=label)
    ax.set(xscale="log", yscale="log", xlabel="input scale s", ylabel="stable step, one-hot regression")
    ax.legend()


def e2_network(ax: Axes, record: dict[str, Any]) -> None:
    for arm, row in record["data"]["stable"].items():
        scales = [float(s) for s in row]
        values = list(row.values())
        centre = [record["data"]["stable_geometric_mean"]["lr"][arm][s] for s in row]
        low = [c - min(v["lr"] for v in found) for c, found in zip(centre, values, strict=True)]
        high = [max(v["lr"] for v in found) - c for c, found in zip(centre, values, strict=True)]
        low = [max(0.0, v) for v in low]
        high = [max(0.0, v) for v in high]
        ax.errorbar(scales, centre, yerr=[low, high], marker="o", capsize=3, color=COLOURS[arm], label=LABELS[arm])
    ax.set(xscale="log", yscale="log", xlabel="input scale s", ylabel="largest stable lr, MLP (range over seeds)")
    ax.legend(ncols=2)


def e3_losses(ax: Axes, record: dict[str, Any]) -> None:
    for arm, runs in record["data"]["runs"].items():
        blown = sum(r["blown_up_at"] is not None for r in runs)
        for i, run in enumerate(runs):
            label = f"{LABELS[arm]}: {blown} of {len(runs)} blow up" if i == 0 else None
            ax.plot(
                range(len(run["losses"])), run["losses"], color=COLOURS[arm], alpha=0.6, linewidth=0.8, label=label
            )
    ax.set(xlabel="step", ylabel=f"training loss, lr {record['config']['lr']:g}", yscale="log")
    ax.legend()


def e3_plateau(ax: Axes, record: dict[str, Any]) -> None:
    plateaus = record["data"]["plateaus"]
    etas = [float(e) for e in plateaus]
    seeds = list(zip(*([p["level"] for p in rows] for rows in plateaus.values()), strict=True))
    series = over_seeds(seeds)
    ax.errorbar(etas, **series, fmt="o", capsize=3, color=COLOURS["muon"], label="Muon's plateau")
    middle = len(etas) // 2
    theory = [series["y"][middle] * (e / etas[middle]) ** 2 for e in etas]
    ax.plot(etas, theory, **THEORY, label="theory: eta^2")
    ax.plot(etas, [rows[0]["bound"] for rows in plateaus.values()], color="#777777", label="bound")
    ax.set(xscale="log", yscale="log", xlabel="constant step eta", ylabel="f, mean over the second half")
    ax.legend()


def e3_falsifier(ax: Axes, record: dict[str, Any]) -> None:
    rows = record["data"]["falsifier"]
    share = [sum(r["blown_up_at"] is not None for r in found) / len(found) for found in rows.values()]
    ax.bar([f"{float(lr):g}" for lr in rows], share, color=COLOURS["muon"])
    ax.axhline(0, **THEORY, label="'Muon cannot diverge' (convex case)")
    ax.set(xlabel="Muon's lr on [0, 1] digits", ylabel="share of runs that blow up", ylim=(-0.03, 1.2))
    ax.legend(loc="upper left")


def e4_iterations(ax: Axes, record: dict[str, Any]) -> None:
    rows = record["data"]["problems"]["wide"]
    horizontal_bars(ax, list(rows), list(rows.values()), COLOURS["muon"])
    frozen = number(rows["frozen C^-1/2, line search"]["mean"])
    ax.axvline(frozen, **THEORY, label="theory: as the frozen C^-1/2")
    ax.set(xlabel="iterations to f / f0 = 1e-4", xscale="log")
    ax.legend()


def e4_square(ax: Axes, record: dict[str, Any]) -> None:
    rows = record["data"]["problems"]["square"]
    horizontal_bars(ax, list(rows), list(rows.values()), COLOURS["sgd"])
    ax.axvline(number(rows["frozen C^-1/2, line search"]["mean"]), **THEORY, label="frozen C^-1/2")
    ax.set(xlabel="iterations to f / f0 = 1e-4", xscale="log")
    ax.legend()


def e4_law(ax: Axes, record: dict[str, Any]) -> None:
    law = record["data"]["law"]
    kappa = record["config"]["wide_kappas"][0]
    s = [row["s"] for row in law]
    ax.plot(s, [row["ratio"] for row in law], "o", color=COLOURS["muon"], label="kappa_SGD / kappa_eff, measured")
    grid = [s[0] + i * (s[-1] - s[0]) / 200 for i in range(201)]
    ax.plot(grid, [kappa ** (1 - abs(1 - v)) for v in grid], **THEORY, label="theory: kappa(A)^(1 - |1 - s|)")
    ax.axhline(1, color="#999999", linewidth=0.8)
    ax.set(xlabel="s, in C proportional to A^(2s)", ylabel="gain in condition number", yscale="log")
    ax.legend()


def e4_sweep(ax: Axes, record: dict[str, Any]) -> None:
    sweep = record["data"]["sweep"]
    kappas = [float(k) for k in sweep]
    for name, colour in (("steepest descent", COLOURS["sgd"]), ("Muon, line search", COLOURS["muon"])):
        means, sds = stats([row[name] for row in sweep.values()])
        ax.errorbar(kappas, means, yerr=sds, marker="o", capsize=3, color=colour, label=name)
    means, _ = stats([row["frozen C^-1/2, line search"] for row in sweep.values()])
    ax.plot(kappas, means, **THEORY, label="theory: as C^-1/2, no dependence on kappa_A")
    ax.set(xscale="log", yscale="log", xlabel="kappa_A", ylabel="iterations to f / f0 = 1e-4")
    ax.legend()


def e4_width(ax: Axes, record: dict[str, Any]) -> None:
    rows = record["data"]["widths"]
    for name, colour in (("GD, step 1/L", COLOURS["sgd"]), ("Muon, step s_mean/L", COLOURS["muon"])):
        means, sds = stats([row[name] for row in rows.values()])
        ax.errorbar([int(n) for n in rows], means, yerr=sds, marker="o", capsize=3, color=colour, label=name)
    ax.axhline(record["data"]["width_theory"], **THEORY, label="theory for Muon, n to infinity")
    ax.set(xscale="log", yscale="log", xlabel="columns n, at 16 rows", ylabel="iterations to f / f0 = 1e-4")
    ax.set_xticks([int(n) for n in rows], list(rows))
    ax.minorticks_off()
    ax.legend(loc="center left")


def e5_shapes(ax: Axes, record: dict[str, Any]) -> None:
    rows = record["data"]["shapes"]
    means, sds = stats([row["quotient"] for row in rows.values()])
    ax.errorbar(range(len(rows)), means, yerr=sds, fmt="o", capsize=3, color=COLOURS["muon"])
    ax.axhline(1, **THEORY, label="theory, m << n")
    ax.set_xticks(range(len(rows)), list(rows))
    ax.set(ylabel="gain, measured / predicted", ylim=(0.7, 1.1))
    ax.legend()


def _measured_and_predicted(ax: Axes, rows: dict[str, Any], label: str) -> None:
    x = [float(k) for k in rows]
    for key, colour, text in (
        ("measured", COLOURS["muon"], "measured"),
        ("predicted", "black", "theory, from G alone"),
    ):
        means, sds = stats([row[key] for row in rows.values()])
        style = "--" if key == "predicted" else "-"
        ax.errorbar(x, means, yerr=sds, marker="o", capsize=3, color=colour, linestyle=style, label=text)
    ax.axhline(1, color="#999999", linewidth=0.8)
    ax.set(xlabel=label, ylabel="one-step gain of Muon over SGD")
    ax.legend()


def e5_alignment(ax: Axes, record: dict[str, Any]) -> None:
    _measured_and_predicted(ax, record["data"]["alignment"], "q, in D = A^-q Z B^-q")
    known = record["data"]["alignment_known"]
    ax.plot(
        [float(q) for q in known], list(known.values()), ":", color="black", label="theory, given A and q (m << n)"
    )
    ax.legend()
    ax.set(yscale="log")


def e5_shuffle(ax: Axes, record: dict[str, Any]) -> None:
    _measured_and_predicted(ax, record["data"]["shuffle"], "share of the Hessian's entries shuffled")


def _scatter_threshold(ax: Axes, record: dict[str, Any], key: str, label: str) -> None:
    rows = [
        (number(r[key]), number(r["actual"]), r["step"])
        for r in record["data"]["rows"]["mlp"]
        if number(r["actual"]) < float("inf") and number(r[key]) < float("inf")
    ]
    steps = sorted({step for _, _, step in rows})
    for step, colour in zip(steps, ("#b3502d", "#c9962b", "#3d9a8b", "#1f5fa8"), strict=False):
        chosen = [(x, y) for x, y, at in rows if at == step]
        xs, ys = [x for x, _ in chosen], [y for _, y in chosen]
        ax.scatter(xs, ys, s=9, alpha=0.7, color=colour, label=f"after {step} steps")
    ends = [min(min(x, y) for x, y, _ in rows), max(max(x, y) for x, y, _ in rows)]
    ax.plot(ends, ends, **THEORY, label="equal")
    ax.set(xscale="log", yscale="log", xlabel=label, ylabel="actual stable step of the layer")
    ax.legend()


def e6_bound(ax: Axes, record: dict[str, Any]) -> None:
    _scatter_threshold(ax, record, "bound", "the paper's bound 2 s_mean / l")


def e6_nds(ax: Axes, record: dict[str, Any]) -> None:
    _scatter_threshold(ax, record, "quadratic_threshold", "2 s_mean / NDS(O)")


def e6_gain(ax: Axes, record: dict[str, Any]) -> None:
    for (name, rows), colour in zip(record["data"]["rows"].items(), ("#1f5fa8", "#b3502d", "#3d9a8b"), strict=True):
        steps = sorted({r["step"] for r in rows})
        means, sds = [], []
        for step in steps:
            found = [
                number(r["gain"]) / number(r["gain_predicted"])
                for r in rows
                if r["step"] == step and 0 < number(r["gain"]) < float("inf")
            ]
            series = over_seeds([[v] for v in found])
            means += series["y"]
            sds += series["yerr"]
        ax.errorbar(steps, means, yerr=sds, marker="o", capsize=3, color=colour, label=name)
    ax.axhline(1, **THEORY, label="theory")
    ax.set(xlabel="training step", ylabel="gain, measured / predicted (SD over layers, seeds)", yscale="log")
    ax.legend()


def e7_epochs(network: str) -> Panel:
    def panel(ax: Axes, record: dict[str, Any]) -> None:
        rows = record["data"][network]
        short = [name.replace(" (same Frobenius norm)", "").replace(" (Kaon)", "") for name in rows]
        labels = [
            s + (f" ({r['never']} never)" if r["never"] else "") for s, r in zip(short, rows.values(), strict=True)
        ]
        horizontal_bars(ax, labels, list(rows.values()), COLOURS["muon"])
        training = [number(row["training"]["mean"]) for row in rows.values()]
        ax.plot(training, range(len(training)), "D", color=COLOURS["nsgd"], markersize=5, label="on training accuracy")
        ax.axvline(number(rows["Muon, lr 0.03"]["mean"]), **THEORY, label="Muon at lr 0.03")
        ax.set(xlabel="epochs to 97% test accuracy (bars)", ylim=(len(rows) + 0.3, -0.6))
        ax.legend(loc="lower right", ncols=2)

    return panel


def e7_linear(ax: Axes, record: dict[str, Any]) -> None:
    rows = record["data"]["linear"]
    horizontal_bars(ax, list(rows), list(rows.values()), COLOURS["muon"])
    ax.axvline(number(rows["NSGD, annealed"]["mean"]) / 4, **THEORY, label="a quarter of NSGD (criterion)")
    ax.set(xlabel="iterations to f / f0 = 1e-4", xscale="log")
    ax.legend()


def e8_arms(ax: Axes, record: dict[str, Any]) -> None:
    rows = dict(sorted(record["data"]["arms"].items(), key=lambda item: number(item[1]["mean"])))
    labels = [f"{LABELS[kind].partition(' (')[0]}, lr {row['lr']:g}" for kind, row in rows.items()]
    horizontal_bars(ax, labels, list(rows.values()), COLOURS["muon"])
    means, _ = stats(list(rows.values()))
    others = [number(row["mean"]) for kind, row in rows.items() if kind not in ("muon", "random", "flat_adam")]
    ax.axvline(min(others) - 0.25, **THEORY, label="best unflattened arm minus 0.25")
    limits = (min(min(means), min(others) - 0.25) - 0.1, max(means) + 0.25)
    ax.set(xlabel="validation loss, nats per character", xlim=limits, ylim=(len(rows) + 0.3, -0.8))
    ax.legend(loc="lower right")


def e8_iterations(ax: Axes, record: dict[str, Any]) -> None:
    rows = record["data"]["ablation"]
    counted = {int(k.removeprefix("k = ")): row for k, row in rows.items() if k.startswith("k = ")}
    means, sds = stats(list(counted.values()))
    ax.errorbar(list(counted), means, yerr=sds, marker="o", capsize=3, color=COLOURS["muon"], label="Keller, k steps")
    ax.axhline(number(rows["exact"]["mean"]), **THEORY, label="exact polar factor (the theory's Muon)")
    ax.set(xlabel="Newton-Schulz iterations", ylabel="validation loss, nats per character")
    ax.legend()


def ns_ranges(ax: Axes, record: dict[str, Any]) -> None:
    table = [
        r
        for r in record["data"]["table"]
        if r["spectrum"] == "cond 1e2" and r["dtype"] == "float32" and (r["steps"] in (5, 6, 8) or "low" not in r)
    ] + [
        r
        for r in record["data"]["table"]
        if r["spectrum"] == "cond 1e2" and r["dtype"] == "float32" and r["schedule"] in ("aol", "deepseek_v4")
    ]
    for place, row in enumerate(table):
        ax.plot([number(row["low"]), number(row["high"])], [place, place], color=COLOURS["muon"], linewidth=4)
    ax.set_yticks(range(len(table)), [f"{r['schedule']} x{r['steps']}" for r in table], fontsize=6.5)
    ax.axvline(1, **THEORY, label="exact polar factor")
    ax.set(xlabel="range of the singular values, condition 1e2, fp32")
    ax.invert_yaxis()
    ax.legend()


def ns_stable(ax: Axes, record: dict[str, Any]) -> None:
    rows = [r for r in record["data"]["real"] if r["dtype"] == "float32" and "stable_ratio" in r]
    for place, row in enumerate(rows):
        s = row["stable_ratio"]
        ax.plot([number(s["min"]), number(s["max"])], [place, place], color=COLOURS["muon"], linewidth=1.5)
        ax.plot([number(s["median"])], [place], "o", color=COLOURS["muon"], markersize=4)
    ax.set_yticks(range(len(rows)), [f"{r['schedule']} x{r['steps']}" for r in rows], fontsize=6.5)
    ax.axvline(1, **THEORY, label="exact polar factor")
    ax.set(xlabel="stable step / exact, real momentum (range and median)")
    ax.invert_yaxis()
    ax.legend()


def ns_steps(ax: Axes, record: dict[str, Any]) -> None:
    shown = ("keller", "polar_express", "cubic", "you", "cans")
    for name, colour in zip(shown, ("#1f5fa8", "#3d9a8b", "#b3502d", "#c9962b", "#8457a5"), strict=True):
        rows = [
            r
            for r in record["data"]["table"]
            if r["schedule"] == name and r["spectrum"] == "cond 1e4" and r["dtype"] == "float32"
        ]
        means, sds = stats([r["polar_error"] for r in rows])
        ax.errorbar([r["flops"] / 1e6 for r in rows], means, yerr=sds, marker="o", capsize=3, color=colour, label=name)
    ax.axhline(0, **THEORY, label="exact polar factor")
    ax.set(xlabel="MFLOPs, 128 x 512", ylabel="relative polar error, condition 1e4, fp32")
    ax.legend()


PANELS: dict[str, list[tuple[str, Panel]]] = {
    "E1": [
        ("The threshold follows the mean", e1_law),
        ("Stable below c = 2, unstable above", e1_multiples),
        ("A residual does not shrink the step", e1_residual),
    ],
    "E2": [("Units: s^-2 against s^-1", e2_regression), ("Largest stable lr of an MLP", e2_network)],
    "E3": [
        ("One lr, raw pixels", e3_losses),
        ("Constant step: a plateau, no divergence", e3_plateau),
        ("Falsifier: Muon does blow up", e3_falsifier),
    ],
    "E4": [
        ("16 x 256: m << n", e4_iterations),
        ("Falsifier: 32 x 32", e4_square),
        ("The condition number's law", e4_law),
        ("No dependence on kappa_A", e4_sweep),
        ("The guaranteed step needs m << n", e4_width),
    ],
    "E5": [
        ("The formula by shape", e5_shapes),
        ("Where the error lies decides", e5_alignment),
        ("Falsifier: Hessian not Kronecker", e5_shuffle),
    ],
    "E6": [
        ("The bound is safe, and far away", e6_bound),
        ("Directional sharpness ranks steps", e6_nds),
        ("The formula along training", e6_gain),
    ],
    "E7": [
        ("Digits, MLP", e7_epochs("MLP")),
        ("MLP from torch's init", e7_epochs("MLP, torch's init")),
        ("Digits, CNN", e7_epochs("CNN")),
        ("Deep linear network", e7_linear),
    ],
    "E8": [("Each arm at its own lr", e8_arms), ("How many iterations", e8_iterations)],
    "NS": [
        ("What comes out", ns_ranges),
        ("Effect on the stable step", ns_stable),
        ("Error against arithmetic", ns_steps),
    ],
}
