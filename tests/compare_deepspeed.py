"""Ours against DeepSpeed's own Muon, paired in one run: `python -m tests.compare_deepspeed --profile small`.

For each case both engines are made on the same ranks, and their optimizer steps alternate, so that a load on the
machine meets both. Prints a Markdown table and writes the figures as JSON. A step is backward over 32 tokens and
`engine.step()`, because DeepSpeed's own Muon works in the epilogue of backward at stages 1 and 2. Newton-Schulz runs
in fp32 on both sides (theirs in its own dtype with `--their-dtype own`), theirs by `--their-method`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tests.adapters.deepspeed_ranks as ranks  # sets the environment before DeepSpeed is imported  # isort: skip

import deepspeed
import deepspeed.runtime.zero.muon.original_muon as theirs
import torch
import torch.distributed as dist

import muon_dist
from tests.distributed import run_ranks
from tests.traffic import Traffic

PROFILES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6},
    "medium": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 16, "num_attention_heads": 8},
}
VOCABULARY = {"tiny": 256, "small": 4096, "medium": 8192}


@dataclass(frozen=True)
class Setting:
    name: str
    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"


OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SETTINGS = [
    Setting("stage 0", 0),
    Setting("stage 1", 1),
    Setting("stage 2", 2),
    Setting("stage 3", 3),
    Setting("stage 2 offload", 2, OFFLOAD),
    Setting("stage 3 offload", 3, OFFLOAD),
    Setting("stage 1 bf16", 1, {}, "bf16"),
    Setting("stage 3 bf16", 3, {}, "bf16"),
]


def model_of(profile: str) -> torch.nn.Module:
    settings = dict(PROFILES[profile])
    heads = settings["num_attention_heads"]
    ranks.MODELS["compared"] = {"model_type": "llama", "num_key_value_heads": heads, **settings}
    return ranks.make_model("compared", vocab_size=VOCABULARY[profile])


def configuration(setting: Setting, world: int, own: bool) -> dict[str, Any]:
    case = ranks.Case(setting.stage, setting.dtype, zero=dict(setting.zero))
    config = ranks.ds_config(case, world)
    config["train_micro_batch_size_per_gpu"] = 1
    if setting.stage == 3 and not own:
        config["zero_optimization"]["reduce_scatter"] = False  # its Muon refuses otherwise
    if not own:
        config["optimizer"] = {"type": "Muon", "params": {"lr": 0.02, "weight_decay": 0.1, "torch_adam": True}}
    return config


class Side:
    """One engine, what its steps cost, and what they sent."""

    def __init__(self, setting: Setting, profile: str, own: bool, method: str) -> None:
        world = dist.get_world_size()
        model = model_of(profile)
        self.vocabulary = VOCABULARY[profile]
        self.own = own
        self.calls = 0
        config = configuration(setting, world, own)
        if own:
            groups = muon_dist.param_groups(model, lr=0.02, weight_decay=0.1)
            self.muon = muon_dist.Muon(groups, ns_dtype=torch.float32)
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.muon, config=config)
            muon_dist.attach(self.engine)
        else:
            config["optimizer"]["params"]["ns_method"] = method
            parameters = [p for p in model.parameters() if p.requires_grad]
            self.engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
        self.times: list[float] = []
        self.traffic = Traffic()
        self.step(0, measured=False)

    def step(self, index: int, measured: bool = True) -> None:
        """One optimizer step, timed between barriers from the start of backward, its traffic counted from forward."""
        generator = torch.Generator().manual_seed(index * 97 + dist.get_rank())
        tokens = torch.randint(0, self.vocabulary, (1, 32), generator=generator)
        traffic = Traffic()
        with traffic:
            loss = self.engine(input_ids=tokens, labels=tokens).loss
            dist.barrier()
            started = time.perf_counter()
            self.engine.backward(loss)  # DeepSpeed's own Muon orthogonalizes here at stages 1 and 2
            self.engine.step()
            dist.barrier()
            elapsed = time.perf_counter() - started
        if measured:
            self.times.append(elapsed)
            self.traffic = traffic

    def momentum(self) -> int:
        state = self.engine.optimizer.state if not self.own else self.muon.state
        buffers = [s["momentum_buffer"] for s in state.values() if "momentum_buffer" in s]
        return sum(b.numel() for b in buffers)


def count_their_calls(counter: list[int], in_fp32: bool) -> None:
    """Count the matrices that DeepSpeed orthogonalizes, in whichever function it does; let it do so in fp32."""
    if in_fp32:
        theirs.ns_compute_dtype = lambda ns_method="gram": torch.float32
    for name in ("zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz"):
        original = getattr(theirs, name, None)
        if original is None:
            continue

        def counted(g: torch.Tensor, *args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            counter[0] += g.shape[0] if g.ndim == 3 else 1
            return _original(g, *args, **kwargs)

        setattr(theirs, name, counted)


def adamw_traffic(setting: Setting, profile: str) -> float:
    """What the same step receives under torch's AdamW."""
    model = model_of(profile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=configuration(setting, dist.get_world_size(), True)
    )
    vocabulary = VOCABULARY[profile]
    for index in range(2):
        tokens = torch.randint(0, vocabulary, (1, 32), generator=torch.Generator().manual_seed(index))
        with Traffic() as traffic:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
    engine.destroy()
    return traffic.total


def compare(settings: list[Setting], profile: str, steps: int, method: str, in_fp32: bool) -> list[dict[str, Any]]:
    """On each rank; figures are this rank's."""
    deepspeed.init_distributed("gloo", verbose=False)
    counter = [0]
    count_their_calls(counter, in_fp32)
    rows = []
    for setting in settings:
        ours, deep = Side(setting, profile, True, method), Side(setting, profile, False, method)
        before, counter[0] = ours.muon.orthogonalized, 0
        for index in range(1, steps + 1):
            first, second = (ours, deep) if index % 2 else (deep, ours)
            first.step(index)
            second.step(index)
        rows.append(
            {
                **asdict(setting),
                "ours_seconds": ours.times,
                "deepspeed_seconds": deep.times,
                "ours_bytes": ours.traffic.total,
                "deepspeed_bytes": deep.traffic.total,
                "adamw_bytes": adamw_traffic(setting, profile),
                "ours_calls": (ours.muon.orthogonalized - before) / steps,
                "deepspeed_calls": counter[0] / steps,
                "ours_momentum": ours.momentum(),
                "deepspeed_momentum": deep.momentum(),
                "parameters": sum(p.numel() for p in model_of(profile).parameters()),
            }
        )
        ours.engine.destroy()
        deep.engine.destroy()
    return rows


def table(by_rank: list[list[dict[str, Any]]]) -> str:
    """Markdown: times of the slowest rank, bytes and momentum of the busiest, calls over all ranks."""
    lines = [
        "| case | step, DeepSpeed / ours | ours, s | MB received a rank: DeepSpeed, ours (AdamW) "
        "| Newton-Schulz calls: DeepSpeed, ours | momentum elements a rank: DeepSpeed, ours |",
        "|---|---|---|---|---|---|",
    ]
    for i, row in enumerate(by_rank[0]):
        every = [rows[i] for rows in by_rank]
        ratio = statistics.median(d / o for o, d in zip(row["ours_seconds"], row["deepspeed_seconds"], strict=True))
        largest = {k: max(r[k] for r in every) for k in row if k.endswith(("_bytes", "_momentum"))}
        calls = {k: sum(r[k] for r in every) for k in ("ours_calls", "deepspeed_calls")}
        lines.append(
            f"| {row['name']} | {ratio:.2f} | {statistics.median(row['ours_seconds']):.3f} "
            f"| {largest['deepspeed_bytes'] / 1e6:.1f}, {largest['ours_bytes'] / 1e6:.1f} "
            f"({largest['adamw_bytes'] / 1e6:.1f}) | {calls['deepspeed_calls']:g}, {calls['ours_calls']:g} "
            f"| {largest['deepspeed_momentum']:,}, {largest['ours_momentum']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    parser.add_argument("--their-method", default="standard", choices=["standard", "gram"])
    parser.add_argument("--their-dtype", default="fp32", choices=["fp32", "own"])
    parser.add_argument("--out", type=Path, default=Path("results/compare_deepspeed"))
    options = parser.parse_args()
    settings = [s for s in SETTINGS if options.only in s.name]
    by_rank = run_ranks(
        compare,
        options.ranks,
        settings,
        options.profile,
        options.steps,
        options.their_method,
        options.their_dtype == "fp32",
        timeout=3000.0,
    )
    count = by_rank[0][0]["parameters"]
    text = (
        f"{count / 1e6:.1f}M Llama, {options.ranks} ranks, {options.steps} paired steps, torch {torch.__version__}, "
        f"DeepSpeed {deepspeed.__version__}, {os.cpu_count()} cores\n\n{table(by_rank)}\n"
    )
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(
        json.dumps({"options": vars(options) | {"out": str(options.out)}, "ranks": by_rank}, indent=1) + "\n",
        encoding="utf-8",
    )
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
