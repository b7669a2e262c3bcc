"""Which errors mean that another rank has ended, and which come from this rank's own device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from muon_dist.adapters.hf.guards.run import GuardedRun
from muon_dist.errors import PeerError
from muon_dist.exchange.transport import Transport

# what torch raises in the first call that waits for the device, here the flags of the gradients
OF_THE_DEVICE = [
    torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
    RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3318, unhandled cuda error, NCCL version 2.27.5"),
]
OF_THE_NETWORK = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4"),
    RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation"),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error, NCCL version 2.27.5"),
    dist.DistNetworkError("failed to recv, got 0 bytes"),
]


def named(error: RuntimeError) -> PeerError | None:
    """The error as the optimizer's step names it while the gradient flags are exchanged."""
    transport = Transport(None, torch.device("cpu"))
    transport.progress.enter("gradient flags")
    return transport.named(error)


@pytest.mark.parametrize("error", OF_THE_DEVICE, ids=lambda e: str(e)[:24])
def test_an_error_of_the_device_stays_what_it_is(error: Exception) -> None:
    assert named(error) is None
    assert GuardedRun(print).named(error) is None


@pytest.mark.parametrize("error", OF_THE_NETWORK, ids=lambda e: str(e)[:24])
def test_a_failed_message_names_the_operation(error: Exception) -> None:
    for found in (named(error), GuardedRun(print).named(error)):
        assert isinstance(found, PeerError) and "Another rank has ended" in str(found)
    assert "gradient flags in step 1 failed" in str(named(error))


def test_other_errors_stay() -> None:
    assert named(RuntimeError("size mismatch")) is None
    assert GuardedRun(print).named(RuntimeError("size mismatch")) is None
