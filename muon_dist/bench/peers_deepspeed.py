"""DeepSpeed: its engine with our Muon and AdamW, and with its own Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.original_muon as theirs
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger, safe_get_full_fp32_param
from torch import nn

from muon_dist.adapters.deepspeed import attach, prepare_process
from muon_dist.bench.cases import LR, MOMENTUM, NS_DTYPES, Case
from muon_dist.bench.sides import Builder, Calls, Side, momentum_bytes
from muon_dist.optim.muon import Muon

ITERATIONS = ("zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz")


class EngineSide(Side):
    """A DeepSpeed engine. At stages 1 to 3 DeepSpeed's own Muon works in backward."""

    works_in_backward = True

    def __init__(self, engine: Any, calls: Any, scale: str) -> None:
        self.engine = engine
        self._calls = calls
        self.scale = scale
        self.parameters: dict[str, Any] = dict(engine.module.named_parameters())
        self._hooks: list[Any] = []

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.engine(input_ids=tokens, labels=tokens).loss

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def calls(self) -> int:
        return self._calls()

    def give(self, gradients: Mapping[str, torch.Tensor]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            self.parameters[name].register_hook(lambda found, given=given: given.to(found.dtype))
            for name, given in gradients.items()
        ]

    def whole(self, name: str) -> torch.Tensor:
        parameter = self.parameters[name]
        if not self.engine.zero_optimization():
            return parameter.detach().float()
        return safe_get_full_fp32_param(parameter).detach().float()

    def momentum_bytes(self) -> int:
        inner = self.engine.basic_optimizer
        wrapper = self.engine.optimizer
        return momentum_bytes([inner if isinstance(inner, Muon) or not hasattr(wrapper, "state") else wrapper])

    def close(self) -> None:
        self.engine.destroy()


def configuration(case: Case) -> dict[str, Any]:
    """The engine's, without an optimizer."""
    # DeepSpeed allocates its whole bucket, by default 2 GB, which would hide everything else in the memory peak.
    zero: dict[str, Any] = {"stage": int(case.sharding.removeprefix("zero")), "reduce_bucket_size": 2**24}
    if case.sharding == "zero3":
        zero["stage3_param_persistence_threshold"] = 0
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": case.dtype == "bf16"},
        "steps_per_print": 10**9,
    }


def _prepare(case: Case) -> None:
    logger.setLevel("ERROR")
    prepare_process(gpu=case.device == "cuda")


def initialize(model: nn.Module, optimizer: Any, config: dict[str, Any]) -> Any:
    """An engine. Our Muon is attached; without an optimizer DeepSpeed makes the one in `config`."""
    logger.setLevel("ERROR")
    prepare_process(gpu=False)
    if config.get("fp16", {}).get("enabled"):
        # DeepSpeed refuses fp16 on most processors; torch computes it in software.
        get_accelerator().is_fp16_supported = lambda: True
    given: dict[str, Any] = {"optimizer": optimizer}
    if optimizer is None:
        given = {"model_parameters": [p for p in model.parameters() if p.requires_grad]}
    engine, *_ = deepspeed.initialize(model=model, config=config, **given)
    if isinstance(optimizer, Muon):
        attach(engine)
    return engine


def make(model: nn.Module, case: Case, build: Builder) -> EngineSide:
    """An engine around an optimizer of torch's kind."""
    _prepare(case)
    built = build(model, case)
    (optimizer,) = built.optimizers
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration(case))
    if isinstance(optimizer, Muon):
        attach(engine)
    return EngineSide(engine, built.calls, built.scale)


def make_theirs(model: nn.Module, case: Case) -> EngineSide:
    """An engine around DeepSpeed's own Muon, in its default form (Gram), in the dtype of the case.

    By default it computes in fp16 if the processor can, which is the case "fp16"; in fp32 its arithmetic is the same
    as ours.
    """
    _prepare(case)
    dtype = NS_DTYPES[case.ns_dtype]
    theirs.ns_compute_dtype = lambda ns_method="gram": dtype
    counters = [Calls(theirs, name) for name in ITERATIONS]
    config = configuration(case)
    config["optimizer"] = {
        "type": "Muon",
        "params": {"lr": LR, "momentum": MOMENTUM, "weight_decay": 0.0, "torch_adam": True, "ns_method": "gram"},
    }
    if case.sharding == "zero3":
        config["zero_optimization"]["reduce_scatter"] = False  # its Muon refuses otherwise
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    return EngineSide(engine, lambda: sum(c() for c in counters), "spectral")
