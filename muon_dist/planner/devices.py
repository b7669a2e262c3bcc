"""Speed and memory of one rank's device, and the speed of its links."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from muon_dist.errors import ConfigError
from muon_dist.model.peaks import gpu_peak_flops, peak_flops

GB = 1e9
GIB = 2**30
# Shares of the peak that large matrix products, whole training steps and large messages reach: rules of thumb.
# `--device measured` replaces the share of products. 0.6 of the dense peak: what cuBLAS reaches in bf16 on an H100 SXM
# under its power limit. 0.4: the MFU of well-tuned dense pretraining (PaLM, arXiv 2204.02311, table 3: 0.462; Llama 3,
# arXiv 2407.21783, table 4: 0.38 to 0.43). 0.8: nccl-tests' bus bandwidth over the nominal one.
MATMUL_SHARE = 0.6
TRAINING_SHARE = 0.4
LINK_SHARE = 0.8
COLLECTIVE_SECONDS = 30e-6  # seconds of a collective with an empty message; NCCL over InfiniBand takes 20 to 50 us


@dataclass(frozen=True)
class Device:
    """One rank's accelerator. bytes/s are in one direction; each rank has its own network card.

    Attributes:
        name: for messages and tables.
        half, single: dense peak FLOP/s of matrix products in bf16 and in fp32.
        memory: bytes.
        memory_bandwidth: bytes/s.
        inside: bytes/s of a rank to others of its node.
        between: bytes/s of a rank to other nodes.
        source: source of the figures.
        matmul_share: share of the peak that large products reach. type: torch's device type.
    """

    name: str
    half: float
    single: float
    memory: float
    memory_bandwidth: float
    inside: float
    between: float
    source: str
    matmul_share: float = MATMUL_SHARE
    type: str = "cuda"

    def matmul(self, dtype: torch.dtype) -> float:
        """FLOP/s that products in `dtype` reach."""
        return (self.half if dtype in (torch.bfloat16, torch.float16) else self.single) * self.matmul_share


def _gpu(
    name: str, known_as: str, memory: float, bandwidth: float, inside: float, between: float, source: str
) -> Device:
    half = gpu_peak_flops(known_as, torch.bfloat16)
    single = gpu_peak_flops(known_as, torch.float32)
    assert half is not None and single is not None
    return Device(name, half, single, memory * GB, bandwidth * GB, inside * GB, between * GB, source)


# Memory in GB, memory bandwidth and NVLink or Infinity Fabric in GB/s one way, from the vendors' data sheets; peak
# rates are in model/peaks.py. Between nodes: one 400 Gbit/s card per GPU (50 GB/s), as in DGX H100, H200 and B200;
# 200 Gbit/s for A100 (DGX A100).
DEVICES: dict[str, Device] = {
    "a100": _gpu("a100", "A100", 80, 2039, 300, 25, "NVIDIA A100 80GB SXM data sheet, 2021; NVLink 600 GB/s"),
    "h100": _gpu("h100", "H100", 80, 3350, 450, 50, "NVIDIA H100 SXM data sheet, 2023; NVLink 900 GB/s both ways"),
    "h200": _gpu("h200", "H200", 141, 4800, 450, 50, "NVIDIA H200 SXM data sheet, 2023; NVLink 900 GB/s both ways"),
    "b200": _gpu("b200", "B200", 180, 7700, 900, 50, "NVIDIA DGX B200 data sheet, 2024, an eighth; NVLink 1800 GB/s"),
    "mi300x": _gpu("mi300x", "MI300X", 192, 5300, 448, 50, "AMD MI300X data sheet, 2023; 7 links of 64 GB/s one way"),
    "cpu": Device(
        "cpu", 5e10, 5e10, 4 * GIB, 10 * GB, 1 * GB, 0.125 * GB,
        "one core of a laptop, an order of magnitude; use --device measured for this machine", type="cpu",
    ),
}  # fmt: skip


def find_device(name: str) -> Device:
    """The device called `name`, or this machine's for "measured". Raises ConfigError."""
    if name == "measured":
        return measured_device()
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: unknown device; use measured, or one of {', '.join(DEVICES)}")
    return DEVICES[name]


def measured_device() -> Device:
    """This machine as one rank sees it: products and copies are timed, links come from the table."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda") if cuda else torch.device("cpu")
    half, single = peak_flops(device, torch.bfloat16), peak_flops(device, torch.float32)
    if half is None or single is None:
        raise ConfigError(f"--device measured: {torch.cuda.get_device_name()} is unknown; use a name from the table")
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else _free_memory()
    links = DEVICES["h100" if cuda else "cpu"]
    return Device(
        "measured", half, single, float(memory), _copy_bandwidth(device), links.inside, links.between,
        f"timed on this machine; links as {links.name}", MATMUL_SHARE if cuda else 1.0, device.type,
    )  # fmt: skip


def _free_memory() -> float:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = {line.split(":")[0]: line.split()[1] for line in file}
    return float(fields["MemTotal"]) * 1024


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by `lerp_` on tensors much larger than any cache."""
    a = torch.zeros(2**24, device=device)
    b = torch.ones_like(a)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a.lerp_(b, 0.5)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 3 * a.numel() * a.element_size() / best
