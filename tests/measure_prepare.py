"""Speed and memory of `prepare` compared with a loop over HF tokenizers: python -m tests.measure_prepare CORPUS
TOKENIZER

CORPUS: a JSON-lines file with `text`. Both sides read it, encode with the same tokenizer, add the end-of-sequence
token to each document, and write 16-bit tokens. The loop is `encode_batch` of 1,000 texts on as many threads as
`prepare` has processes. Each measurement is a process of its own; the sides run in turn. What `prepare` needs once,
whatever the size of the corpus, is measured apart: loading the tokenizer imports transformers and torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

LOOP = """
import json, sys, time
import numpy as np
from tokenizers import Tokenizer
corpus, folder, out = sys.argv[1:4]
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.encode_special_tokens = True
eos = tokenizer.token_to_id("<|eos|>")
start, size, count, texts = time.perf_counter(), 0, 0, []
def encode(stream):
    global count
    for one in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream.write(np.array(one.ids + [eos], dtype="<u2").tobytes())
        count += len(one.ids) + 1
    texts.clear()
with open(corpus, encoding="utf-8", newline="\\n") as lines, open(out, "wb") as stream:
    for line in lines:
        texts.append(json.loads(line)["text"])
        size += len(texts[-1].encode())
        if len(texts) == 1000:
            encode(stream)
    encode(stream)
print(json.dumps({"bytes": size, "tokens": count, "seconds": time.perf_counter() - start}))
"""
OURS = """
import json, sys, time
from muon_dist.data import Source, load_tokenizer, prepare
if __name__ == "__main__":
    corpus, folder, out, workers = sys.argv[1:5]
    start = time.perf_counter()
    load_tokenizer(folder)
    once = time.perf_counter() - start
    start = time.perf_counter()
    made = prepare([Source(path=corpus)], folder, out, workers=int(workers), progress=False)
    seconds = time.perf_counter() - start
    tokens, size = (sum(pair) for pair in zip(made.totals("train"), made.totals("validation")))
    print(json.dumps({"bytes": size, "tokens": tokens, "seconds": seconds, "once": once}))
"""


def measured(words: list[str], **variables: str) -> tuple[dict[str, float], float]:
    """(what the process printed, peak memory in MiB of it and its children)."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            try:
                members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                # shared pages count once
                peak = max(peak, sum(member.memory_full_info().pss for member in members))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"ended with {process.returncode}")
    return json.loads(out.splitlines()[-1]), peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "ours.py")  # a file: worker processes import the main module
        script.write_text(OURS)
        for workers in options.workers:
            for number in range(options.rounds):
                common = [str(options.corpus), str(options.tokenizer)]
                out = f"{folder}/{workers}-{number}"
                begun = time.perf_counter()
                threads = {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
                ours, memory = measured([sys.executable, str(script), *common, out, str(workers)], **threads)
                loop, its = measured([sys.executable, "-c", LOOP, *common, f"{out}.bin"], **threads)
                assert (ours["tokens"], ours["bytes"]) == (loop["tokens"], loop["bytes"])
                speed = [one["bytes"] / one["seconds"] / 1e6 for one in (ours, loop)]
                print(
                    f"{workers} processes: prepare {speed[0]:.2f} MB/s, {memory:.0f} MiB; tokenizers' loop "
                    f"{speed[1]:.2f} MB/s, {its:.0f} MiB; ratio {speed[0] / speed[1]:.2f}; "
                    f"once {ours['once']:.1f} s; "
                    f"{ours['bytes'] / 1e6:.1f} MB, {time.perf_counter() - begun:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
