"""Peak FLOP/s, by a device's name and measured."""

from __future__ import annotations

import torch

from muon_dist.model.peaks import gpu_peak_flops, peak_flops


def test_device_peaks() -> None:
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.4e12
    assert gpu_peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert gpu_peak_flops("NVIDIA A100-SXM4-40GB", torch.float32) == 19.5e12
    assert gpu_peak_flops("Somebody's next GPU", torch.bfloat16) is None
    measured = peak_flops(torch.device("cpu"), torch.float32)
    assert measured is not None and measured > 1e8
