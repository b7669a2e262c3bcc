"""Sources behind http:// and s3://, from real servers on this machine.

They need packages that muon_dist does not install: aiohttp (http), s3fs and moto's server (s3). `bash .ci/extended
remote` installs them and runs these tests.
"""

from __future__ import annotations

import functools
import gzip
import http.server
import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from muon_dist.data.corpus import Source, documents, same_source, source_record
from muon_dist.data.document import SourceGoneError
from tests.data.refusal import refused

REQUIRED = os.environ.get("MUON_DIST_TEST_REMOTE") == "required"


def need(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None and not REQUIRED:
            pytest.skip(f"{name} is not installed")


def texts_of(source: Source) -> list[str]:
    return [document.data.decode() for document in documents(source)]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def write_corpus(folder: Path) -> None:
    """a.jsonl.gz with two documents, b.parquet with one, and a README."""
    with gzip.open(folder / "a.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in ("one", "two\u2028two"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three"]}), folder / "b.parquet")
    (folder / "README.md").write_text("about these files")


@pytest.fixture()
def served(tmp_path: Path) -> Iterator[tuple[Path, str, http.server.ThreadingHTTPServer]]:
    """A folder, and its address while it is served."""
    need("aiohttp")
    folder = tmp_path / "served"
    folder.mkdir()
    write_corpus(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    server.server_close()


def test_http(served: tuple[Path, str, http.server.ThreadingHTTPServer]) -> None:
    folder, address, server = served
    source = Source(path=[f"{address}/a.jsonl.gz", f"{address}/b.parquet"])
    assert texts_of(source) == ["one", "two\u2028two", "three"]
    known = source_record(source)
    local = source_record(Source(path=[str(folder / "a.jsonl.gz"), str(folder / "b.parquet")]))
    assert [f["sha256"] for f in known["files"]] == [f["sha256"] for f in local["files"]]
    assert same_source(known, source_record(source, known))
    with gzip.open(folder / "a.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": "changed"}) + "\n")
    assert not same_source(known, source_record(source, known)), "a change behind the same address was not noticed"
    with refused(f"{address}/nothing.jsonl", "no such file"):
        texts_of(Source(path=f"{address}/nothing.jsonl"))
    server.shutdown()
    server.server_close()
    assert source_record(source, known) == known, "tokens of a source that is gone cannot be used"
    with pytest.raises(SourceGoneError, match=r"cannot be reached|no such file"):
        source_record(source)


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("s3fs", "moto")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(name, value)
        write_corpus(tmp_path)
        import s3fs

        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("corpus")
        for path in sorted(tmp_path.iterdir()):
            bucket.put(str(path), f"corpus/part/{path.name}")
        whole = Source(path="s3://corpus/part")
        assert texts_of(whole) == ["one", "two\u2028two", "three"]
        assert texts_of(Source(path="s3://corpus/*/*.parquet")) == ["three"]
        assert texts_of(Source(path=["s3://corpus/part/b.parquet", "s3://corpus/part/a.jsonl.gz"]))[0] == "three"
        known = source_record(whole)
        assert same_source(known, source_record(whole, known))
        bucket.pipe("corpus/part/c.jsonl", b'{"text": "four"}\n')
        assert not same_source(known, source_record(whole, known)), "a new object was not noticed"
        with refused("s3://corpus/nowhere", "no such file"):
            texts_of(Source(path="s3://corpus/nowhere"))
        with refused("s3://nosuchbucket", "no such file"):
            texts_of(Source(path="s3://nosuchbucket/x"))
    finally:
        server.stop()


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/a.txt", "s3fs"), ("http://127.0.0.1:1/a.txt", "aiohttp")])
def test_a_missing_package_is_named(url: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with refused(url, package):
        texts_of(Source(path=url))
