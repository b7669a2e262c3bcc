"""The whole job on a real corpus: python -m tests.whole_job [--megabytes 40] [--transformers4 FOLDER]

The corpus is the text installed with this interpreter: documentation, docstrings, and Python source for the rest. It
is written in four formats and prepared from each: the tokens must be the same bytes. Two ranks train, are killed with
SIGKILL, and one rank goes on with other settings; a run that was never killed must end with the same loss. Then eval,
generate and export; plain transformers, without muon_dist, must find the same loss from the same raw text.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import psutil
import pyarrow
import pyarrow.parquet

from muon_dist.checkpoint import newest_good

ROOT = Path(__file__).parents[1]
SEPARATOR = "\n<<< next document >>>\n"
LONGEST, SHORTEST = 100_000, 400  # characters of a document
STEPS, SAVE = 40, 10
CONFIG = """
name: killed
run_dir: {folder}/runs
tokenizer: {{vocab_size: 4096, sample_bytes: 5000000}}
data:
  sources: [{{path: "{folder}/corpus/text/*", separator: {separator}}}]
  dir: {folder}/data
  sequence_length: 128
  workers: 2
  global_batch_size: 12
  validation_fraction: 0.001
model: {{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2, max_position_embeddings: 128, rope_theta: 500000, tie_word_embeddings: true}}
optimizer: {{muon: {{lr: 0.01, ns_dtype: float32}}, adamw: {{lr: 0.01}}}}
trainer: {{use_cpu: true, max_steps: {steps}, per_device_train_batch_size: 4, logging_steps: 1, save_steps: {save},
  eval_strategy: "no", lr_scheduler_type: linear, warmup_steps: 4}}
evaluation: {{generate_prompt: "Return the", generate_tokens: 16}}
"""
# Different from above; these settings may change when a run continues.
OTHER_SETTINGS = ("trainer.per_device_train_batch_size=6", "trainer.save_steps=15", "trainer.logging_steps=5",
                  "trainer.eval_strategy=steps", "trainer.eval_steps=20", "data.workers=1",
                  "evaluation.generate_tokens=8")  # fmt: skip
PLAIN = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert "muon_dist" not in sys.modules
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
ids = []
for line in open(text, encoding="utf-8"):
    ids += tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id]
samples = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
total = 0.0
with torch.no_grad():
    for batch in samples.split(32):
        total += model(batch, labels=batch).loss.double().item() * len(batch) / len(samples)
    prompt = torch.tensor([tokenizer("Return the")["input_ids"]])
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)
print(json.dumps({"version": transformers.__version__, "loss": total, "tokens": samples.numel(),
                  "answer": tokenizer.decode(answer[0])}))
"""


def documents(size: int) -> Iterator[str]:
    """Different texts of at least `size` bytes in all."""
    roots = [Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])]
    names = [
        path for root in roots for path in sorted(root.rglob("*")) if path.suffix in (".md", ".rst", ".txt", ".py")
    ]
    names = list(dict.fromkeys(path for path in names if not path.is_relative_to(ROOT)))
    prose = [(path, plain) for path in names if path.suffix in (".md", ".rst", ".txt")]
    python = [path for path in names if path.suffix == ".py"]
    first = sorted(prose + [(path, docstrings) for path in python], key=lambda one: crc32(str(one[0]).encode()))
    seen: set[str] = set()
    for path, read in [*first, *((path, plain) for path in python)]:
        text = read(path)[:LONGEST]
        if len(text) < SHORTEST or SEPARATOR in text or text in seen:
            continue
        seen.add(text)
        yield text
        size -= len(text.encode())
        if size <= 0:
            return
    raise SystemExit(f"{size} bytes of text are missing: ask for fewer megabytes")


def plain(path: Path) -> str:
    """A file as text; None if it is not UTF-8. Line ends as in Python, so that every format can store them."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (UnicodeDecodeError, OSError):
        return ""


def docstrings(path: Path) -> str:
    """The texts between three quotes in a module, mostly docstrings. Parsing would take minutes."""
    return "\n\n".join(text.strip() for text in re.findall(r'"""(.*?)"""', plain(path), re.DOTALL))


def write_formats(folder: Path, texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The corpus in four formats. Returns the source of each, as a configuration has it."""
    for name in ("text", "jsonl", "parquet", "csv"):
        (folder / name).mkdir(parents=True)
    half = len(texts) // 2
    for number, part in enumerate((texts[:half], texts[half:])):
        (folder / "text" / f"{number}.txt").write_text(SEPARATOR.join(part), encoding="utf-8", newline="")
        with gzip.open(folder / "jsonl" / f"{number}.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as stream:
            stream.writelines(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(part))
        table = pyarrow.table({"id": range(len(part)), "doc": [{"body": text} for text in part]})
        pyarrow.parquet.write_table(table, folder / "parquet" / f"{number}.parquet", row_group_size=500)
        with (folder / "csv" / f"{number}.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("id", "text"), *((k, text) for k, text in enumerate(part))])
    return {
        "text": {"path": f"{folder}/text/*", "separator": SEPARATOR},
        "jsonl": {"path": f"{folder}/jsonl"},
        "parquet": {"path": [f"{folder}/parquet/{k}.parquet" for k in range(2)], "text_field": "doc.body"},
        "csv": {"dataset": f"{folder}/csv"},
    }


def command(*arguments: str, ranks: int = 1) -> list[str]:
    """muon-dist as a user starts it on a number of ranks."""
    if ranks == 1:
        return [sys.executable, "-m", "muon_dist.cli", *arguments]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "muon_dist.cli"]
    return [sys.executable, *torchrun, *arguments]


def done(words: Sequence[str], **environment: str) -> tuple[str, float, float]:
    """(standard output, seconds, peak memory in MiB of all its processes) of a command that must end well."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err, cwd=ROOT, env={**os.environ, **environment})
        while process.poll() is None:
            peak = max(peak, sum(memory(one) for one in tree(process.pid)))
            time.sleep(0.1)
        out.seek(0), err.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)}\nended with {process.returncode}\n{out.read()}\n{err.read()[-4000:]}")
        return out.read(), time.perf_counter() - start, peak / 2**20


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def killed(words: Sequence[str], checkpoints: Path, step: int) -> None:
    """Start a training and kill all its processes a moment after the checkpoint of `step` was committed."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT)
        while not (checkpoints / f"checkpoint-{step}").exists():
            if process.poll() is not None:
                log.seek(0)
                raise SystemExit(
                    f"the training ended with {process.returncode} before it was killed\n{log.read()[-4000:]}"
                )
            time.sleep(0.05)
        for one in tree(process.pid):
            one.kill()
        process.wait()


def tokens(data: Path) -> dict[str, bytes]:
    """The token files below a data folder."""
    found = sorted((data / "tokens").glob("*/*/*.bin"))
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in found}


def prepare_all(folder: Path, config: Path, sources: dict[str, dict[str, Any]], size: int) -> None:
    """Prepare from each format in a separate folder, with the tokenizer of the first; compare the bytes."""
    known: dict[str, bytes] = {}
    for name, source in sources.items():
        own = [f"data.sources=[{json.dumps(source)}]", f"data.dir={folder}/data-{name}"]
        if known:
            own += [f"tokenizer.path={folder}/data-text/tokenizer", "tokenizer.vocab_size=null"]
        _, seconds, peak = done(command("prepare", str(config), *own))
        print(f"prepare {name}: {seconds:.1f} s, {size / seconds / 1e6:.2f} MB/s, {peak:.0f} MiB at most", flush=True)
        found = tokens(folder / f"data-{name}")
        assert found and (not known or found == known), f"the tokens from {name} differ"
        known = found
    same = f"data.sources=[{json.dumps(sources['parquet'])}]"
    before = {path: path.stat().st_ino for path in (folder / "data-text").rglob("*.bin")}
    done(command("prepare", str(config), same, f"data.dir={folder}/data-text"))
    assert before == {path: path.stat().st_ino for path in before}, "another format of the same documents was prepared"
    print("tokens: equal from all formats; another format of the same documents is not prepared again")


def train_all(folder: Path, config: Path) -> None:
    """Kill a run of two ranks, continue on one rank; compare with a run that was not killed."""
    run, options = folder / "runs" / "killed", [f"data.dir={folder}/data-text"]
    killed(command("train", str(config), *options, ranks=2), run / "checkpoints", 2 * SAVE)
    newest = newest_good(run / "checkpoints")
    assert newest is not None
    print(f"killed on 2 ranks; the newest good checkpoint is {newest.path.name}")
    _, seconds, _ = done(command("train", str(config), *options, *OTHER_SETTINGS, "--resume", "auto"))
    print(f"resumed on 1 rank with {', '.join(OTHER_SETTINGS)}: {seconds:.1f} s")
    done(command("train", str(config), *options, "name=whole", ranks=2))
    first, second = (json.loads((folder / "runs" / n / "summary.json").read_text()) for n in ("killed", "whole"))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in logged if "loss" in line]
    assert steps == [*range(1, 2 * SAVE + 1), 25, 30, 35, 40], f"another logging_steps was not used: {steps}"
    away = abs(first["validation_loss"] - second["validation_loss"])
    print(f"validation loss: killed {first['validation_loss']:.6f}, never killed {second['validation_loss']:.6f}")
    assert away < 2e-3 and first["steps"] == second["steps"] == STEPS, "the resumed run is another one"


def use_all(folder: Path, held_out: Path, transformers4: Path | None) -> None:
    """Evaluate, generate and export the run; compare with plain transformers."""
    run, out = folder / "runs" / "killed", folder / "exported"
    ours = json.loads(done(command("eval", str(run), "--text", str(held_out)))[0].splitlines()[-1])
    print(f"eval of raw text: {ours}")
    assert ours["step"] == STEPS
    text, _, _ = done(command("generate", str(run), "--prompt", "Return the", "--tokens", "12", "--temperature", "0"))
    done(command("export", str(run), str(out)))
    versions = {"5": "", **({"4.57": str(transformers4)} if transformers4 is not None else {})}
    for wanted, extra in versions.items():
        words = [sys.executable, "-c", PLAIN, str(out), str(held_out), "128"]
        plain = json.loads(done(words, PYTHONPATH=extra)[0].splitlines()[-1])
        print(f"plain transformers {plain['version']}: {plain}")
        assert plain["version"].startswith(wanted), f"{plain['version']} is not {wanted}"
        assert abs(plain["loss"] - ours["loss"]) < 1e-5, "the exported model has another loss"
        assert plain["answer"].strip() in text, f"other text than generate: {text!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--folder", type=Path, help="where everything is left; a temporary one is removed")
    parser.add_argument("--transformers4", type=Path, help="a folder with transformers 4.57 (pip install --target)")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="whole-job-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        texts = list(documents(int(options.megabytes * 1e6)))
        held_out = folder / "held-out.jsonl"
        held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::500][:30]), encoding="utf-8")
        size = sum(len(text.encode()) for text in texts)
        print(f"corpus: {len(texts):,} documents, {size / 1e6:.1f} MB", flush=True)
        sources = write_formats(folder / "corpus", texts)
        os.environ["HF_HOME"] = str(folder / "hf")  # what datasets makes of the csv files
        config = folder / "config.yaml"
        separator = json.dumps(SEPARATOR)
        config.write_text(CONFIG.format(folder=folder, separator=separator, steps=STEPS, save=SAVE), encoding="utf-8")
        prepare_all(folder, config, sources, size)
        train_all(folder, config)
        use_all(folder, held_out, options.transformers4)
        print("the whole job: done")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
