"""DeepSpeed engines for `muon-dist bench conformance`."""

from __future__ import annotations

from typing import Any

from torch import nn

from muon_dist.bench.conformance_cases import Case


def make_engine(case: Case, model: nn.Module, *, lr: float, momentum: float, decay: float, clip: float) -> Any:
    """An engine around the case's optimizer, or around DeepSpeed's own Muon as its documentation configures it."""
    from muon_dist.bench.peers_deepspeed import initialize

    stage = int(case.framework.removeprefix("zero")) if case.framework.startswith("zero") else 0
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 2**20}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if case.condition == "offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2 if case.condition == "accumulation" else 1,
        "gradient_clipping": clip if case.condition == "clip" else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if case.condition == "bf16":
        config["bf16"] = {"enabled": True}
    if case.condition == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    if case.framework == "autotp":
        config["tensor_parallel"] = {"autotp_size": case.ranks}
    optimizer = None
    if case.peer.build is not None:
        (optimizer,) = case.peer.build(model)
    else:
        params = {"lr": lr, "momentum": momentum, "weight_decay": decay, "adam_lr": 3e-3, "torch_adam": True}
        config["optimizer"] = {"type": "Muon", "params": params}
        if stage == 3:
            zero["reduce_scatter"] = False  # its Muon refuses otherwise
    return initialize(model, optimizer, config)
