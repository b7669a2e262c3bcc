"""QK-clip against plain fp64 loops: kinds of attention, layouts, 16-bit weights, and which models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, DistributedConfig, TrainingArguments

from muon_dist import Muon, MuonTrainer, param_groups
from muon_dist.adapters.hf.attention import attach, highest_logits
from muon_dist.errors import ConfigError, FrameworkError, NonFiniteError
from tests.adapters.plain_qk_clip import (
    ADAMW_LR,
    DECAY,
    EPS,
    KINDS,
    LR,
    SAMPLES,
    STEPS,
    THRESHOLDS,
    VOCABULARY,
    batch,
    labels_in,
    loss_of,
    make_model,
    plain_weights,
)
from tests.distributed import run_ranks

TOLERANCE = 2e-5
Tensors = dict[str, torch.Tensor]


def make_muon(model: Any, **options: Any) -> Muon:
    groups = param_groups(model, lr=LR, weight_decay=DECAY, adamw_lr=ADAMW_LR, adamw_weight_decay=0.0)
    return Muon(groups, eps=EPS, ns_dtype=torch.float32, **options)


def shared_of(rank: int, world: int, step: int) -> dict[str, torch.Tensor]:
    """This rank's samples of the batch."""
    return {name: value.chunk(world)[rank] for name, value in batch(step).items()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def far(model: Any, wanted: Tensors) -> float:
    """Largest difference of any weight from the plain ones; those must be of the same model."""
    found = {n.removeprefix("module."): full(p) for n, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    return max(float((found[n].double() - wanted[n]).abs().max()) for n in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_as_in_plain_lines(kind: str) -> None:
    """Maxima of each head and step, and the weights at the end; recomputation and evaluation in between."""
    threshold = THRESHOLDS.get(kind, 2.0)
    wanted, history = plain_weights(kind, threshold)
    without, _ = plain_weights(kind, None)
    model = make_model(kind)
    if kind in ("llama", "gpt2"):
        model.gradient_checkpointing_enable({"use_reentrant": kind == "gpt2"})
    optimizer = make_muon(model)
    clip = attach(model, optimizer, threshold=threshold)
    clipped = 0
    for step in range(STEPS):
        inputs = batch(step)
        for part in (slice(0, 2), slice(2, SAMPLES)):  # micro-batches
            loss_of(model, {n: v[part] for n, v in inputs.items()}, labels_in(inputs)).backward()
        with torch.no_grad():
            model.eval()(input_ids=batch(step + 50)["input_ids"])
            model.train()
        seen = clip.maxima.taken(torch.device("cpu"))
        heads = [value for layer in clip.maxima.layers for value in history[step][layer.name]]
        assert seen.tolist() == pytest.approx(heads, abs=TOLERANCE)
        for number, layer in enumerate(clip.maxima.layers):  # put them back
            clip.maxima.record(number, seen[number * layer.heads : (number + 1) * layer.heads])
        optimizer.step()
        optimizer.zero_grad()
        clipped += clip.clipped
        assert clip.max_logit == pytest.approx(max(heads), abs=TOLERANCE)
    assert 0 < clipped < STEPS * 8
    assert far(model, wanted) < TOLERANCE < 0.01 < far(model, without)


def layouts(cases: list[tuple[str, str]], wanted: dict[str, Tensors]) -> dict[tuple[str, str], float]:
    """The distance from plain weights under copies (DDP) and FSDP2, the batch over all ranks."""
    world, rank, found = dist.get_world_size(), dist.get_rank(), {}
    for layout, kind in cases:
        model = make_model(kind)
        if layout == "copies":
            wrapped = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (world,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        optimizer = make_muon(model)
        attach(model, optimizer, threshold=THRESHOLDS.get(kind, 2.0))
        for step in range(STEPS):
            # the mean over the ranks is the sum over the samples
            loss = loss_of(wrapped, shared_of(rank, world, step), labels_in(batch(step)))
            (loss * world).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[layout, kind] = far(model, wanted[kind])
    return found


def test_copies_and_fsdp2() -> None:
    cases = [("copies", "qwen2"), ("fsdp2", "qwen2"), ("fsdp2", "olmo2"), ("fsdp2", "deepseek_v3")]
    wanted = {kind: plain_weights(kind, THRESHOLDS.get(kind, 2.0))[0] for _, kind in cases}
    for found in run_ranks(layouts, 3, cases, wanted):
        assert found.keys() == set(cases) and max(found.values()) < TOLERANCE, found


def tensor_parallel(folder: str, sizes: dict[str, int], wanted: Tensors) -> float:
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), dtype=torch.float32
    ).train()
    optimizer, tp = make_muon(model), sizes["tp_size"]
    attach(model, optimizer, threshold=2.0, share=lambda: (dist.get_rank() % tp, tp))
    for step in range(STEPS):
        parts = dist.get_world_size() // tp
        inputs = shared_of(dist.get_rank() // tp, parts, step)
        (loss_of(model, inputs, labels_in(batch(step))) * parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return far(model, wanted)


def test_tensor_parallelism_sees_some_of_the_heads(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    wanted = plain_weights("llama", 2.0)[0]
    for sizes in ({"tp_size": 2}, {"tp_size": 2, "fsdp_size": 2}):
        ranks = sizes["tp_size"] * sizes.get("fsdp_size", 1)
        assert max(run_ranks(tensor_parallel, ranks, str(tmp_path), sizes, wanted)) < TOLERANCE


@pytest.mark.parametrize("masters", [True, False])
def test_16_bit_weights(masters: bool) -> None:
    """The master is scaled and the weight is it, rounded; without masters the product is rounded once."""
    model = make_model("llama").to(torch.bfloat16)
    optimizer = make_muon(model, master_weights=masters, process_group=None)
    clip = attach(model, optimizer, threshold=1e6)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before: list[torch.Tensor] = []

    def note(*_: object) -> None:  # after the step, before what follows
        before.append((optimizer.master_weights()[weight] if masters else weight).detach().clone())
        clip.threshold = 1.0

    optimizer._optimizer_step_post_hooks.move_to_end(optimizer.register_step_post_hook(note).id, last=False)
    inputs = batch(0)
    loss_of(model, inputs, labels_in(inputs)).backward()
    layer = clip.maxima.layers[0]
    g = layer.g(clip.maxima._found[0].tolist(), 1.0)
    optimizer.step()
    factors = torch.tensor(g).sqrt().repeat_interleave(12)[:, None]
    assert min(g) < 0.9
    if masters:
        master = optimizer.master_weights()[weight]
        torch.testing.assert_close(master, before[0] * factors, rtol=1e-6, atol=0)
        assert torch.equal(weight, master.to(torch.bfloat16))
    else:
        assert torch.equal(weight, (before[0] * factors).to(torch.bfloat16))


def test_a_step_that_is_left_out_scales_nothing() -> None:
    model = make_model("llama")
    optimizer = make_muon(model, process_group=None)
    attach(model, optimizer, threshold=0.1)
    inputs = batch(0)
    loss_of(model, inputs, labels_in(inputs)).backward()
    model.lm_head.weight.grad[0, 0] = torch.nan
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_logits_of_long_sequences_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8)
    every = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, 1)) * 0.3
    seen = torch.ones(70, 70, dtype=torch.bool).tril()
    window = seen & ~seen.tril(-5)
    monkeypatch.setattr("muon_dist.adapters.hf.attention._SCORES", 1)
    wanted = every.masked_fill(~seen, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(highest_logits(q, k, None, 0.3, True), wanted)
    torch.testing.assert_close(highest_logits(q, k, None, 0.3, False), every.amax((0, 2, 3)))
    wanted = every.masked_fill(~window, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(highest_logits(q, k, window.expand(2, 1, 70, 70), 0.3, True), wanted)
    added = torch.zeros(1, 1, 70, 70).masked_fill(~window, torch.finfo(torch.float32).min)
    torch.testing.assert_close(highest_logits(q, k, added, 0.3, True), wanted)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("qwen3", {}, "q_norm bounds the logits, and all heads share its weight of shape"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv"),
        ("llama4_text", {}, "qk_norm"),
        ("gemma2", {}, "'eager'"),
    ],
)
def test_models_that_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "hidden_size": 24, "intermediate_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **settings))
    with pytest.raises(FrameworkError, match=f"qk_clip: .*{message}"):
        attach(model, make_muon(model, process_group=None))


def test_options_and_parameters_that_are_refused() -> None:
    model = make_model("llama")
    with pytest.raises(ConfigError, match="threshold is -1"):
        attach(model, make_muon(model), threshold=-1)
    with pytest.raises(ConfigError, match=r"hyperball restores the norm of model.layers.0.self_attn.q_proj.weight"):
        attach(model, Muon(param_groups(model, lr=0.1, weight_decay=None), rule="hyperball"))
    with pytest.raises(ConfigError, match="the optimizer is SGD"):
        attach(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    with pytest.raises(FrameworkError, match=r"does not step model.layers.1.self_attn.k_proj.weight"):
        attach(model, make_muon(model))


def test_an_infinite_logit_is_named() -> None:
    model = make_model("llama")
    optimizer = make_muon(model, process_group=None)
    clip = attach(model, optimizer)
    inputs = batch(0)
    loss_of(model, inputs, labels_in(inputs)).backward()
    clip.maxima.record(1, torch.tensor([0.0, 0.0, torch.nan, 0.0]))
    with pytest.raises(NonFiniteError, match=r"head 2 of model.layers.1.self_attn"):
        optimizer.step()


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index % SAMPLES] for name, value in batch(index // SAMPLES).items()}


@pytest.mark.slow
def trainer(folder: Path, steps: int, **options: Any) -> MuonTrainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        logging_steps=1, save_steps=3, eval_strategy="steps", eval_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, learning_rate=LR, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    muon = {"print_routing": False, "ns_dtype": torch.float32}
    rows = _Rows()
    return MuonTrainer(
        make_model("llama"), args, muon=muon, qk_clip={"threshold": 2.0}, train_dataset=rows, eval_dataset=rows,
        train_sampler=lambda consumed: ((7 * i) % 24 for i in range(consumed, 10_000)),
    )  # fmt: skip


def test_the_trainer_resumes_exactly(tmp_path: Path) -> None:
    """Also with gradient checkpointing, which changes no bit here; the log tells the largest logit."""
    whole = trainer(tmp_path / "whole", 5)
    whole.train()
    logged = [entry for entry in whole.state.log_history if "qk_clip/max_logit" in entry]
    assert len(logged) == 5 and logged[0]["qk_clip/heads"] == 8 and logged[-1]["qk_clip/max_logit"] > 0
    trainer(tmp_path / "parts", 3, gradient_checkpointing=True).train()
    rest = trainer(tmp_path / "parts", 5)
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for (name, p), q in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(p, q), name
