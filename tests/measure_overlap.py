"""What overlap gains: the optimizer step with and without it, in turn, on two hosts with a link of a given rate.

    python -m tests.measure_overlap --rate 1gbit

Each host is a network namespace of this machine and one rank with one thread (root, or unprivileged user namespaces).
The matrices are those of a small Llama, sliced over the ranks as by ZeRO-3: all momentum and all updates travel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from muon_dist.layout import PlacedParameter, cut_parameter, per_parameter_layout
from muon_dist.layout.per_parameter import slice_length
from muon_dist.optim import Binding, Muon
from tests.namespaces import hosts

PORT = "29400"


def sliced(layers: int, width: int, **options: object) -> Muon:
    """Muon on this rank's slices of the matrices of `layers` Llama layers, with gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inner = width * 8 // 3
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes * layers]
    names = [f"m{i}" for i in range(len(parameters))]
    optimizer = Muon([{"params": parameters, "param_names": names}], lr=0.02, **options)
    sizes = [slice_length(p.numel(), world) for p in parameters]
    ends = list(itertools.accumulate(sizes))
    shard = torch.nn.Parameter(torch.zeros(ends[-1]))
    shard.grad = torch.randn(ends[-1], generator=torch.Generator().manual_seed(rank))
    placed = [
        PlacedParameter(name, p.numel(), end - size, cut_parameter(name, p.shape))
        for name, p, size, end in zip(names, parameters, sizes, ends, strict=True)
    ]
    optimizer.param_groups[0]["params"] = [shard]
    layout = per_parameter_layout([placed], world)
    optimizer.bind(Binding(layout, (shard,), dist.group.WORLD, torch.device("cpu")), {0: 0})
    return optimizer


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = {overlap: sliced(args.layers, args.width, overlap=overlap, bucket_mb=args.bucket_mb) for overlap in (1, 0)}
    taken: dict[int, list[float]] = {1: [], 0: []}
    for turn in range(args.steps + 1):
        for overlap, optimizer in made.items():
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            dist.barrier()
            if turn:
                taken[overlap].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        with_overlap, without = (statistics.median(taken[overlap]) for overlap in (1, 0))
        runtime = made[1].runtime
        assert runtime is not None
        print(
            json.dumps(
                {
                    "rate": args.rate,
                    "elements": runtime.plan.layout.numel,
                    "buckets": len(runtime._recipes_for((0,))),
                    "seconds_with_overlap": round(with_overlap, 4),
                    "seconds_without": round(without, 4),
                    "ratio": round(with_overlap / without, 3),
                    "ratios": [round(a / b, 3) for a, b in zip(taken[1], taken[0], strict=True)],
                }
            ),
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default=None, help="of the link, as for tc: 1gbit, 200mbit; not limited if left out")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--bucket-mb", type=float, default=16.0)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with hosts(2, rate=args.rate) as pair:
        processes = []
        for rank, host in enumerate(pair):
            env = host.environment(
                RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR=pair[0].address, MASTER_PORT=PORT, OMP_NUM_THREADS="1"
            )
            command = [sys.executable, "-m", "tests.measure_overlap", "--worker", *sys.argv[1:]]
            processes.append(host.popen(command, env=env, stdout=subprocess.PIPE if rank == 0 else None, text=True))
        output, _ = processes[0].communicate()
        processes[1].wait()
    sys.stdout.write(output)
    sys.exit(processes[0].returncode or processes[1].returncode)


if __name__ == "__main__":
    main()
