"""MuonFactory under a stock Trainer, and MuonTrainer: logs, clipping, data order, checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from muon_dist import Muon, MuonFactory, MuonTrainer
from muon_dist.errors import CheckpointError, ConfigError
from tests.distributed import RankFailure, run_ranks

VOCABULARY, LENGTH = 64, 16
BATCH = 4


class Words(torch.utils.data.Dataset):
    """Sequences that count upwards from a start: easy to learn, so that a loss that falls means something."""

    def __init__(self, size: int = 256) -> None:
        starts = torch.randint(0, VOCABULARY, (size, 1), generator=torch.Generator().manual_seed(1))
        self.ids = (starts + torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


class Order:
    """A sample order with a digest, as muon_dist.data.MixtureSampler has."""

    def __init__(self, consumed: int, name: str = "a") -> None:
        self.consumed, self.name = consumed, name

    def __iter__(self) -> Iterator[int]:
        return iter([(7 * i) % 256 for i in range(self.consumed, 10_000)])

    def digest(self) -> str:
        return self.name


def make_model(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":  # with dropout, so that a resumed run needs the right random state
        settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "resid_pdrop": 0.1}
    else:
        settings = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": LENGTH,
        }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **settings))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # accelerate asks, though the ranks have met already
    os.environ.setdefault("MASTER_PORT", "29500")
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    return TrainingArguments(output_dir=str(folder), **settings)


def digest(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the stock Trainer


def stock_example(folder: str) -> tuple[list[float], str, int, bool]:
    """The README's example: transformers only, plus the import and the `optimizer_cls_and_kwargs` line."""
    trainer = Trainer(
        model=make_model(),
        args=arguments(Path(folder), max_steps=30),
        train_dataset=Words(),
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 0.02, "weight_decay": 0.1}),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    held = sum(entry["momentum_buffer"].numel() for entry in optimizer.state.values() if "momentum_buffer" in entry)
    return losses(trainer), digest(trainer.model), held, isinstance(optimizer, Muon)


def test_stock_trainer_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, _, ours = stock_example(str(tmp_path))
    assert ours
    assert found[-1] < 0.5 * found[0]
    shown = capsys.readouterr().out
    assert "model.embed_tokens.weight" in shown and "muon: 14 parameters" in shown


def test_stock_trainer_example_two_ranks(tmp_path: Path) -> None:
    (found, first, held0, ours), (_, second, held1, _) = run_ranks(stock_example, 2, str(tmp_path), timeout=120)
    assert ours
    assert found[-1] < 0.5 * found[0]
    assert first == second, "ranks hold different weights"
    # every matrix has one owner, and both own some
    matrices = sum(p.numel() for n, p in make_model().named_parameters() if "proj" in n)
    assert held0 + held1 == matrices and min(held0, held1) > 0


def stock_session(folder: str, resume: str | None, **options: Any) -> str:
    trainer = Trainer(
        model=make_model(),
        args=arguments(Path(folder), save_strategy="steps", save_steps=3),
        train_dataset=Words(),
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 0.02, "print_routing": False, **options}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return digest(trainer.model)


def stock_session_with_all_momentum(folder: str, resume: str | None) -> str:
    return stock_session(folder, resume, momentum_everywhere=True)


def test_stock_trainer_resumes_exactly_on_two_ranks_with_momentum_everywhere(tmp_path: Path) -> None:
    whole = run_ranks(stock_session_with_all_momentum, 2, str(tmp_path), None)
    resumed = run_ranks(stock_session_with_all_momentum, 2, str(tmp_path), str(tmp_path / "checkpoint-3"))
    assert resumed == whole and whole[0] == whole[1]


def test_stock_trainer_resumes_exactly_on_one_rank(tmp_path: Path) -> None:
    whole = stock_session(str(tmp_path), None)
    assert stock_session(str(tmp_path), str(tmp_path / "checkpoint-3")) == whole


def test_stock_trainer_never_resumes_with_half_of_the_momentum(tmp_path: Path) -> None:
    """A stock Trainer saves what its first rank holds; going on with that alone would be wrong without a word."""
    run_ranks(stock_session, 2, str(tmp_path), None, timeout=120)
    with pytest.raises(RankFailure, match=r"CheckpointError: .*MuonTrainer"):
        run_ranks(stock_session, 2, str(tmp_path), str(tmp_path / "checkpoint-3"), timeout=120)


def test_factory_names_the_closest_argument() -> None:
    with pytest.raises(ConfigError, match=r"argument 'momentun' is unknown: did you mean 'momentum'\?"):
        MuonFactory()(make_model(), lr=0.02, momentun=0.9)


def test_factory_needs_a_learning_rate() -> None:
    with pytest.raises(ConfigError, match="MuonFactory needs lr"):
        MuonFactory()(make_model(), momentum=0.9)


def test_factory_takes_rules_as_plain_data() -> None:
    optimizer = MuonFactory()(
        make_model(),
        lr=0.02,
        adamw_lr=0.003,
        overrides=[{"pattern": r".*q_proj", "algorithm": "adamw"}],
        splits=[{"pattern": r".*o_proj", "heads": 4}],
        print_routing=False,
    )
    by_name = {g["name"]: g for g in optimizer.param_groups}
    assert by_name["muon"]["lr"] == 0.02 and by_name["adamw"]["lr"] == 0.003
    assert not any("q_proj" in name for name in by_name["muon"]["param_names"])
    o_proj = next(s for specs in optimizer.specs for s in specs if "0.self_attn.o_proj" in s.name)
    assert len(o_proj.matrices) == 4


# ---- what MuonTrainer logs


def trained(folder: Path, **changes: Any) -> MuonTrainer:
    settings: dict[str, Any] = {"muon": {"adamw_lr": 0.005, "print_routing": False}, **changes}
    args = settings.pop("args", None) or arguments(folder)
    trainer = MuonTrainer(settings.pop("model", None) or make_model(), args, train_dataset=Words(), **settings)
    trainer.train()
    return trainer


def test_logs(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path,
        eval_dataset=Words(20),
        bytes_per_token=(3.0, 4.0),
        flops_per_token=1000.0,
        peak_flops=1e9,
        metrics_path=tmp_path / "metrics.jsonl",
    )
    evaluated = trainer.evaluate()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for step, line in enumerate(steps):
        assert line["lr/muon"] == pytest.approx(0.02 * (6 - step) / 6)
        assert line["lr/adamw"] == pytest.approx(0.005 * (6 - step) / 6)
        assert line["grad_norm"] == pytest.approx(math.hypot(line["grad_norm/muon"], line["grad_norm/adamw"]))
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2) / 3.0)
        assert line["tokens"] == (step + 1) * BATCH * LENGTH
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * 1000.0 / 1e9)
    assert evaluated["eval_bits_per_byte"] == pytest.approx(evaluated["eval_loss"] / math.log(2) / 4.0)
    assert evaluated["eval_perplexity"] == pytest.approx(math.exp(evaluated["eval_loss"]))
    total = trainer.throughput()
    assert total["tokens"] == 6 * BATCH * LENGTH
    assert total["tokens_per_s"] == pytest.approx(total["tokens"] / total["train_seconds"])


class Gradients(TrainerCallback):
    """Norms of the gradients by algorithm, as the optimizer will see them."""

    def __init__(self) -> None:
        self.norms: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        totals: dict[str, float] = {}
        for group in optimizer.param_groups:
            squares = sum(p.grad.double().square().sum().item() for p in group["params"])
            totals[group["algorithm"]] = totals.get(group["algorithm"], 0.0) + squares
        self.norms.append({name: math.sqrt(total) for name, total in totals.items()})


@pytest.mark.parametrize("muon, adamw", [(None, 0.01), (0.02, None), (0.02, 0.01)])
def test_each_algorithm_is_clipped_by_its_own_bound(tmp_path: Path, muon: float | None, adamw: float | None) -> None:
    seen = Gradients()
    trainer = trained(tmp_path, clip_muon=muon, clip_adamw=adamw, callbacks=[seen])
    for line, norms in zip([e for e in trainer.state.log_history if "loss" in e], seen.norms, strict=True):
        total = math.hypot(line["grad_norm/muon"], line["grad_norm/adamw"])
        assert line["grad_norm"] == pytest.approx(total, rel=1e-4)
        for name, bound in (("muon", muon), ("adamw", adamw)):
            assert bound is None or total > bound, "the bound does not bind, so this shows nothing"
            factor = 1.0 if bound is None else bound / total
            assert norms[name] == pytest.approx(factor * line[f"grad_norm/{name}"], rel=1e-4)


def test_bounds_that_do_not_bind_change_nothing_and_the_logged_norm_is_raw(tmp_path: Path) -> None:
    seen = Gradients()
    trainer = trained(
        tmp_path, clip_muon=50.0, clip_adamw=50.0, callbacks=[seen], train_sampler=lambda consumed: Order(consumed)
    )
    fresh, data = make_model(), Words()
    first = torch.stack([data.ids[i] for i in list(Order(0))[:BATCH]])
    fresh(input_ids=first, labels=first).loss.backward()
    raw = math.sqrt(sum(p.grad.double().square().sum().item() for p in fresh.parameters()))
    assert raw > 1.0, "the global bound of TrainingArguments would not bind, so this shows nothing"
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert line["grad_norm"] == pytest.approx(raw, rel=1e-4)
    assert math.hypot(*seen.norms[0].values()) == pytest.approx(raw, rel=1e-4)


def test_global_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_grad_norm=0\.5 .*clip_adamw"):
        MuonTrainer(make_model(), arguments(tmp_path, max_grad_norm=0.5), train_dataset=Words())


def test_two_choices_of_optimizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both choose the optimizer"):
        MuonTrainer(
            make_model(), arguments(tmp_path), muon={"lr": 1.0}, optimizer_cls_and_kwargs=(MuonFactory, {"lr": 1.0})
        )


# ---- checkpoints


def session(
    folder: str, resume: str | None, accumulation: int = 1, ranks: int = 1, order: str = "a", kind: str = "gpt2"
) -> tuple[str, list[float], list[int]]:
    """Six steps of eight samples, from the start or from a checkpoint: (digest of the weights, losses, samples)."""
    seen: list[int] = []

    class Recorded(Words):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            seen.append(index)
            return super().__getitem__(index)

    trainer = MuonTrainer(
        make_model(kind),
        arguments(
            Path(folder),
            save_strategy="steps",
            save_steps=3,
            per_device_train_batch_size=8 // accumulation // ranks,
            gradient_accumulation_steps=accumulation,
        ),
        muon={"adamw_lr": 0.005, "print_routing": False, "ns_dtype": torch.float32},
        train_dataset=Recorded(),
        train_sampler=lambda consumed: Order(consumed, order),
        metrics_path=Path(folder) / "metrics.jsonl",
    )
    trainer.train(resume_from_checkpoint=resume)
    return digest(trainer.model), losses(trainer), seen


def test_resume_is_exact(tmp_path: Path) -> None:
    whole, whole_losses, whole_samples = session(str(tmp_path), None)
    again, again_losses, again_samples = session(str(tmp_path), str(tmp_path / "checkpoint-3"))
    assert again == whole
    assert again_losses == whole_losses
    # accelerate reads one batch ahead; the resumed run starts with the first sample that was not used
    assert again_samples == whole_samples[24:]
    assert again_samples[0] == (7 * 24) % 256
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len([s for s in steps if s == 5]) == 1


def test_resume_is_exact_with_accumulation(tmp_path: Path) -> None:
    whole, _, _ = session(str(tmp_path), None, 2)
    again, _, _ = session(str(tmp_path), str(tmp_path / "checkpoint-3"), 2)
    assert again == whole


def test_resume_is_exact_on_two_ranks(tmp_path: Path) -> None:
    whole = run_ranks(session, 2, str(tmp_path), None, 1, 2, timeout=120)
    again = run_ranks(session, 2, str(tmp_path), str(tmp_path / "checkpoint-3"), 1, 2, timeout=120)
    assert whole[0][0] == whole[1][0] == again[0][0] == again[1][0]
    assert again[0][1] == whole[0][1]
    assert [a[2] for a in again] == [w[2][12:] for w in whole]


def test_resume_at_another_world_size(tmp_path: Path) -> None:
    """The next samples and the gathered momentum; sums over ranks round differently, so not bit by bit."""
    _, whole_losses, whole_samples = session(str(tmp_path), None, kind="llama")
    (_, two_losses, first), (_, _, second) = run_ranks(
        session, 2, str(tmp_path), str(tmp_path / "checkpoint-3"), 1, 2, "a", "llama", timeout=120
    )
    assert sorted(first + second) == sorted(whole_samples[24:])
    assert two_losses == pytest.approx(whole_losses, rel=1e-4)


def adamw_checkpoint(folder: Path) -> str:
    """Of the same model, trained by another algorithm."""
    model = make_model("gpt2")
    trainer = MuonTrainer(
        model,
        arguments(folder, save_strategy="steps", save_steps=1, max_steps=1, per_device_train_batch_size=8),
        optimizers=(torch.optim.AdamW(model.parameters()), None),
        train_dataset=Words(),
        train_sampler=Order,
    )
    trainer.train()
    return str(folder / "checkpoint-1")


def test_a_checkpoint_that_cannot_continue_is_refused(tmp_path: Path) -> None:
    session(str(tmp_path), None)
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.raises(CheckpointError, match=r"another order of samples"):
        session(str(tmp_path), str(checkpoint), order="b")
    assert checkpoint.is_dir() and (tmp_path / "checkpoint-6").is_dir(), "a refusal moves nothing"
    state = checkpoint / "rank-00000.safetensors"
    data = state.read_bytes()
    state.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors has \d+ bytes, but the manifest says \d+"):
        session(str(tmp_path), str(checkpoint))
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: manifest\.json cannot be read"):
        session(str(tmp_path), str(tmp_path))
    with pytest.raises(CheckpointError, match=r"holds exp_avg, exp_avg_sq, step of .* and no momentum"):
        session(str(tmp_path), adamw_checkpoint(tmp_path / "adamw"))


@pytest.mark.parametrize("way", ["set", "replaced"])
def test_rates_that_are_set_after_the_trainer_was_made_count(tmp_path: Path, way: str) -> None:
    """As a hyper-parameter search sets them; what the caller has given stays."""
    trainer = MuonTrainer(make_model(), arguments(tmp_path), muon={"adamw_lr": 0.5}, train_dataset=Words())
    if way == "set":
        trainer.args.learning_rate, trainer.args.weight_decay = 0.007, 0.3
    else:
        trainer.args = arguments(tmp_path, learning_rate=0.007, weight_decay=0.3)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert (groups["muon"]["lr"], groups["muon"]["weight_decay"]) == (0.007, 0.3)
    assert groups["adamw"]["lr"] == 0.5
