"""Peak FLOP/s of a device, for MFU: looked up for a GPU, measured for a CPU."""

from __future__ import annotations

import time

import torch

# Dense peak in TFLOP/s: (16-bit tensor cores, fp32 without tensor cores), from the vendors' data sheets. The longest
# name contained in torch.cuda.get_device_name() decides.
_GPU_TFLOPS: dict[str, tuple[float, float]] = {
    "A10": (125.0, 31.2),
    "A100": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A6000": (154.8, 38.7),
    "B200": (2250.0, 80.0),
    "GB200": (2500.0, 80.0),
    "GH200": (989.4, 66.9),
    "H100": (989.4, 66.9),  # SXM
    "H100 NVL": (835.0, 60.0),
    "H100 PCIe": (756.0, 51.0),
    "H200": (989.4, 66.9),
    "H20": (148.0, 44.0),
    "L20": (119.5, 59.8),
    "L4": (121.0, 30.3),
    "L40S": (362.0, 91.6),
    "MI250X": (383.0, 47.9),
    "MI300X": (1307.4, 163.4),
    "RTX 3090": (71.0, 35.6),
    "RTX 4090": (165.2, 82.6),
    "RTX 5080": (112.6, 56.3),
    "RTX 5090": (209.5, 104.8),
    "T4": (65.0, 8.1),
    "V100": (125.0, 15.7),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one `device` for matrix products in `dtype`; None for a GPU that is not in the table.

    For a CPU it is measured (best of five products of 512 x 512, about 50 ms), by this process with its number of
    threads, so it is the peak of one rank.
    """
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), dtype)
    if device.type != "cpu":
        return None
    size = 512
    a = torch.randn(size, size).to(dtype)
    b = torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    best = float("inf")
    with torch.no_grad():
        for _ in range(6):  # the first is the warm-up
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def gpu_peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s by the device's name as CUDA reports it ("NVIDIA H100 80GB HBM3"), or None when unknown."""
    words = f" {name.replace('-', ' ')} "
    matching = [known for known in _GPU_TFLOPS if f" {known} " in words]
    if not matching:
        return None
    half, single = _GPU_TFLOPS[max(matching, key=len)]
    return (half if dtype in (torch.float16, torch.bfloat16) else single) * 1e12
