"""The command line never shows a traceback, whatever is wrong with files, libraries, streams and settings."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from muon_dist import failures, streams
from muon_dist.cli import main
from muon_dist.errors import FileError, PeerError, ResourceError, UnexpectedError
from tests.data.test_preparation import in_a_fork
from tests.test_cli import CONFIG, refused, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture()
def config(tmp_path: Path) -> Path:
    """tiny.yaml beside a corpus of 60 short documents."""
    (tmp_path / "corpus").mkdir()
    for number in range(60):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"Document {number} says: one, two, three and {number}.\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(corpus=tmp_path / "corpus", folder=tmp_path))
    return path


# ---- the boundary


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), FileError, "/data/x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), FileError, "check the permissions"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 5000), FileError, "(5000 characters)"),
        (ValueError("Error: I/O error: No space left on device (os error 28)"), FileError, "free some space"),
        (MemoryError(), ResourceError, "per_device_train_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceError, "muon-dist plan"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), PeerError, "another rank"),
        (torch.distributed.DistNetworkError("timed out"), PeerError, "timed out"),
    ],
)  # fmt: skip
def test_kinds_that_have_a_name(error: Exception, kind: type, text: str) -> None:
    found = failures.as_error(error)
    assert type(found) is kind and text in str(found) and "\n" not in str(found)


def test_torch_without_memory_is_known() -> None:
    """The message of the real allocator, which is a bare RuntimeError."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert type(failures.as_error(raised.value)) is ResourceError


def test_an_unforeseen_error_keeps_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken(*_: object, **__: object) -> None:
        raise KeyError("nobody foresaw this")

    monkeypatch.setattr("muon_dist.config.load_config", broken)
    code, _, err = run(capsys, "prepare", "x.yaml")
    assert code == 70 and len(err.splitlines()) == 1 and "unexpected KeyError" in err and "cli.py:" in err, err
    kept = list(tmp_path.glob("muon-dist-error-*.txt"))
    assert len(kept) == 1 and str(kept[0]) in err
    assert "Traceback" in kept[0].read_text() and "in broken" in kept[0].read_text()


def test_without_a_folder_for_it_the_traceback_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.gettempdir", no_folder)
    monkeypatch.setattr("os.getcwd", no_folder)
    found = failures.as_error(KeyError("x"))
    assert type(found) is UnexpectedError and "KeyError: 'x'" in str(found).splitlines()[-1]


# ---- streams


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_run_outlives_its_reader(capsys: pytest.CaptureFixture[str]) -> None:
    stream = streams.Lasting(Gone())
    assert stream.write("step 1") == 6
    stream.flush()
    assert "standard output cannot be written (Broken pipe)" in capsys.readouterr().err


def test_streams_that_are_closed_full_or_narrow() -> None:
    code = (
        "import sys; from muon_dist import streams; streams.make_safe(); streams.outlive_readers();"
        "print('\u00e9 \u4e2d', flush=True); print('on', file=sys.stderr); open('/dev/null').close()"
    )

    def status(redirect: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
        command = f'{sys.executable} -c "$CODE" {redirect}'
        return subprocess.run(
            ["bash", "-c", command], env={**os.environ, "CODE": code, **variables}, capture_output=True, timeout=60
        )

    for redirect in (">&-", "> /dev/full"):
        done = status(redirect)
        assert done.returncode == 0 and b"on" in done.stderr and b"Traceback" not in done.stderr, done
    assert status("2>&-").returncode == 0
    narrow = status("", PYTHONIOENCODING="ascii")
    assert narrow.returncode == 0 and b"\\xe9 \\u4e2d" in narrow.stdout


# ---- settings, before any data is prepared


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("trainer.report_to=wandb", "trainer.report_to: WandbCallback requires wandb"),
        ("trainer.report_to=[mlflow]", "trainer.report_to: MLflowCallback requires mlflow"),
        ("trainer.report_to=nobody", "nobody is not supported"),
        ("trainer.fsdp=full_shard", "trainer.fsdp shards a model over several processes"),
        ("trainer.lr_scheduler_type=cosine_with_min_lr", "min_lr"),
        ("trainer.lr_scheduler_kwargs={nothing: 1}", "trainer.lr_scheduler_kwargs"),
        ("trainer.log_level=loud", "trainer.log_level: 'loud'"),
        ("trainer.metric_for_best_model=fun", "trainer.metric_for_best_model: 'fun'"),
        ("trainer.torch_compile_backend=nobody", "trainer.torch_compile_backend"),
        ("trainer.use_liger_kernel=true", "trainer.use_liger_kernel"),
        ("trainer.accelerator_config=/nowhere.json", "/nowhere.json"),
        ("deepspeed=nowhere.json", "deepspeed: nowhere.json: no such file"),
        ("deepspeed={zero_optimization: 3}", "deepspeed"),
        ("deepspeed={zero_optimization: {stage: two}, train_batch_size: auto}", "zero_optimization"),
        ("model.head_dim=0", "model"),
        ("model.num_attention_heads=5", "attention heads"),
    ],
)
def test_settings_that_frameworks_refuse(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    override: str,
    text: str,
) -> None:
    refused(capsys, 2, text, "train", config, override)
    assert not (config.parent / "data").exists(), "data were prepared first"
    assert not (config.parent / "runs").exists(), "a failed start left a run folder"


@pytest.mark.parametrize(
    "override",
    [
        "max_steps=0", "max_steps=-2", f"max_steps={10**30}", "num_train_epochs=0", "num_train_epochs=.nan",
        "per_device_train_batch_size=0", "per_device_eval_batch_size=-1", "gradient_accumulation_steps=0",
        "dataloader_num_workers=-1", "eval_steps=0", "label_smoothing_factor=2.0", "ddp_timeout=-5",
    ],
)  # fmt: skip
def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], config: Path, override: str) -> None:
    refused(capsys, 2, f"trainer.{override.partition('=')[0]}: ", "train", config, f"trainer.{override}")


def test_epochs_are_still_chosen_by_minus_one(config: Path) -> None:
    from muon_dist.config import load_config

    assert load_config(config, ["trainer.max_steps=-1", "trainer.save_steps=0"]).trainer["max_steps"] == -1


def test_deepspeed_in_one_process(config: Path) -> None:
    """DeepSpeed looked for MPI, and failed on mpi4py. In a fork, because DeepSpeed is set up once per process."""
    block = "deepspeed={zero_optimization: {stage: 2}, train_batch_size: auto, train_micro_batch_size_per_gpu: auto}"
    arguments = ["train", str(config), block, "evaluation.generate_tokens=4"]

    def job() -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code

    assert in_a_fork(job)[0] == 0
    assert (config.parent / "runs" / "tiny" / "model" / "model.safetensors").is_file()


# ---- YAML and overrides


@pytest.mark.parametrize(
    ("override", "prompt"),
    [("a # b", "a # b"), ("# b", "# b"), ("'a # b'", "a # b"), ("a#b", "a#b"), ('"a" # b', None), ("[a] # b", None)],
)
def test_a_hash_in_an_override(config: Path, override: str, prompt: str | None) -> None:
    from muon_dist.config import load_config
    from muon_dist.errors import ConfigError

    if prompt is None:
        with pytest.raises(ConfigError, match="generate_prompt: ends in '# b'"):
            load_config(config, [f"evaluation.generate_prompt={override}"])
    else:
        found = load_config(config, [f"evaluation.generate_prompt={override}"])
        assert found.evaluation.generate_prompt == prompt


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("seed: 0x" + "f" * 5000, "seed: a whole number of more than 63 bits"),
        ("seed: " + "9" * 5000, "seed: '999"),
        ('run_dir: "a\\0b"', "run_dir: contains a NUL"),
        ('run_dir: "\\ud800"', "run_dir: contains a NUL or half"),
        ("run_dir: s3://bucket/x", "run_dir: 's3://bucket/x' is a URL"),
        ("run_dir: ''", "run_dir: is empty"),
        ("run_dir: /proc/x", "run_dir: cannot make the run folder /proc/x/tiny"),
        ("base: ~nobody/x", "base: no such file"),
        ('base: "a\\0b"', "base: "),
        ("base: " + "a" * 5000, "base: cannot be read: File name too long"),
    ],
)
def test_values_that_no_file_system_or_number_holds(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    line: str,
    text: str,
) -> None:
    kept = [x for x in config.read_text().splitlines() if not x.startswith("run_dir")]
    config.write_text("\n".join([*kept, line]) + "\n")
    code, _, err = run(capsys, "train", config)
    assert code == 2 and text in err and len(err) < 1500, err


def test_a_list_that_is_too_short(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    refused(capsys, 2, "optimizer.adamw.betas", "train", config, "optimizer.adamw.betas=[0.9]")


# ---- files


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_where_the_data_folder_should_be(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    where: str,
) -> None:
    (config.parent / "file").write_text("in the way")
    code, _, err = run(capsys, "prepare", config, f"data.dir={config.parent / where}")
    assert code == 74 and str(config.parent / "file") in err and "Traceback" not in err, err


def test_a_device_is_no_corpus(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    refused(capsys, 3, "/dev/null: neither a file nor a folder", "prepare", config, "data.sources.0.path=/dev/null")


def test_json_that_python_cannot_read(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    (config.parent / "x.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    refused(capsys, 3, "x.jsonl:1: ", "prepare", config, f"data.sources.0.path={config.parent / 'x.jsonl'}")


def test_a_dataset_that_breaks_between_two_rows(tmp_path: Path) -> None:
    """`datasets` reads lazily, so it finds late that the second file of the folder is not JSON."""
    from muon_dist.data.readers import read_dataset
    from muon_dist.errors import DataError

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": 5, \n')
    rows = read_dataset(str(tmp_path), None, "train", True, None, "text")
    with pytest.raises(DataError, match=r"cannot be read after row \d") as raised:
        list(rows)
    assert str(tmp_path) in str(raised.value)


def test_metrics_that_were_cut(tmp_path: Path) -> None:
    """A kill or a full disk leaves half a line; a resumed run continues and drops it."""
    from types import SimpleNamespace

    from muon_dist.adapters.hf.callbacks import MetricsFile

    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (0, 1, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 4, "lo'[:-3]]))
    MetricsFile(path).begin_run(None, SimpleNamespace(is_world_process_zero=True, global_step=2))
    assert path.read_text().splitlines() == lines[:3]


# ---- models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of a llama with random weights."""
    from muon_dist.model import build_model

    folder = tmp_path_factory.mktemp("model")
    settings = dict(model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16)  # fmt: skip
    build_model(settings, vocab_size=64, seed=0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_are_not_the_models(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, damage: str
) -> None:
    """Missing weights were drawn at random and evaluated without a message."""
    import shutil

    from safetensors.torch import load_file, save_file

    name = "model.layers.0.self_attn.q_proj.weight"
    shutil.copytree(model, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name][:-1].contiguous()
    if damage == "missing":
        del tensors[name]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    refused(capsys, 7, name, "export", tmp_path / "m", tmp_path / "out")


def test_text_beyond_the_positions_and_of_a_broken_model(model: Path) -> None:
    from muon_dist.errors import ConfigError, NonFiniteError
    from muon_dist.model.load import load_model
    from muon_dist.train.generation import generate

    class Words:
        """A tokenizer with one token per character."""

        bos_token_id = eos_token_id = 1
        pad_token_id = 3

        def __call__(self, text: str, **_: object) -> Any:
            from transformers import BatchEncoding

            ids = torch.tensor([[10 + ord(c) % 50 for c in text]], dtype=torch.long)
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

        def decode(self, ids: torch.Tensor, **_: object) -> str:
            return f"{len(ids)} tokens"

    loaded = load_model(model)
    assert int(generate(loaded, Words(), "abcd", 1000, temperature=0).split()[0]) <= 16
    with pytest.raises(ConfigError, match="the prompt has 16 tokens and the model 16 positions"):
        generate(loaded, Words(), "a" * 16, 4)
    with pytest.raises(ConfigError, match="temperature nan"):
        generate(loaded, Words(), "abcd", 4, temperature=float("nan"))
    with torch.no_grad():
        loaded.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        generate(loaded, Words(), "abcd", 4)


# ---- nothing after the training makes the run fail


def test_a_failing_sample_and_tracker_fail_no_run(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt is longer than the model's positions, and the tracker fails at the first figures."""
    from transformers.integrations import integration_utils

    class Tracker(integration_utils.TensorBoardCallback):
        def __init__(self) -> None:
            pass

        def on_train_begin(self, *_: object, **__: object) -> None:
            pass

        def on_log(self, *_: object, **__: object) -> None:
            raise ConnectionError("the server is gone")

    Tracker.__module__ = integration_utils.__name__
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    code, _, err = run(
        capsys, "train", config, "trainer.report_to=tensorboard", "trainer.logging_steps=1", "trainer.max_steps=2",
        "evaluation.generate_prompt=" + "one two " * 200, "model.max_position_embeddings=16",
    )  # fmt: skip
    assert code == 0, err
    assert "Tracker failed in on_log (ConnectionError: the server is gone)" in err and err.count("Tracker") == 1
    assert "warning: no sample (ConfigError: the prompt has" in err
    folder = config.parent / "runs" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    assert "sample" not in summary and summary["steps"] == 2 and (folder / "model" / "model.safetensors").is_file()


def test_a_tracker_that_cannot_begin_ends_the_start() -> None:
    from transformers.integrations import integration_utils

    from muon_dist.adapters.hf.settings import outlive_trackers
    from muon_dist.errors import ConfigError

    class Tracker(integration_utils.TensorBoardCallback):
        def __init__(self) -> None:
            pass

        def on_train_begin(self, *_: object, **__: object) -> None:
            raise RuntimeError("no key")

    Tracker.__module__ = integration_utils.__name__
    tracker = Tracker()
    outlive_trackers([tracker])
    with pytest.raises(ConfigError, match=r"trainer\.report_to: Tracker cannot start: no key"):
        tracker.on_train_begin(None, None, None)


# ---- the launcher's environment


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is 5"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
    ],
)
def test_environment_of_a_launcher(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str], text: str,
) -> None:  # fmt: skip
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MUON_DIST_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(capsys, "train", config)
    assert code == 2 and text in err, err


def test_a_port_that_is_taken_and_a_peer_that_is_absent(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(taken.getsockname()[1])}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MUON_DIST_STORE", raising=False)
        code, _, err = run(capsys, "train", config, "trainer.ddp_timeout=1")
    assert code == 10 and "MASTER_PORT=" in err and "rank 1" in err, err


def test_an_error_is_told_to_the_launcher_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun ends the other processes when one has failed, also between the opening of the file and the writing."""
    told = tmp_path / "told"
    monkeypatch.setenv("MUON_DIST_FIRST_ERROR", str(told))
    with told.open("ab"):  # of a process that is ended now
        failures.say("first\nof two lines")
        failures.say("second")
    assert told.read_bytes() == b"first\nof two lines\0second\0"


@pytest.mark.parametrize(
    "arguments",
    [["--nproc-per-node=x"], ["--nproc_per_node=x"], ["--nproc_per_node", "x"], ["--nproc-per-node", "x"]],
)
def test_spellings_of_torchrun(arguments: list[str]) -> None:
    done = subprocess.run(
        ["bash", "launch/torchrun.sh", *arguments, "train", "x.yaml"],
        cwd=ROOT, env={**os.environ, "VIRTUAL_ENV": sys.prefix}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and re.search(r"--nproc-per-node .* not 'x'", done.stderr), done.stderr


def test_every_exit_code_is_documented() -> None:
    from muon_dist import errors

    page = (ROOT / "docs" / "index.md").read_text("utf-8")
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and k is not errors.MuonDistError]
    codes = {k.exit_code for k in kinds if issubclass(k, errors.MuonDistError)}
    assert len(codes) == len([k for k in kinds if issubclass(k, errors.MuonDistError)])
    assert all(f"| {code} |" in page for code in codes)
