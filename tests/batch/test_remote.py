"""Images, tables and rows in an S3 store: moto's server, which has an environment of its own.

It wants older packages than ours: `.ci/run` installs it, and names it in $TOOD_MOTO_SERVER.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from batch.test_output import RUN, rows

from tood_deploy.batch.output import BatchOutput
from tood_deploy.batch.source import Chunk, list_images, locate, open_filesystem, read_chunk
from tood_deploy.errors import InputError, OutputError

MOTO = os.environ.get("TOOD_MOTO_SERVER")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MOTO is None, reason="TOOD_MOTO_SERVER names no server of moto"),
]
KEYS = ("2026/0/a.jpg", "2026/0/b.png", "2026/1/c.jpg", "2026/1/notes.txt")
START_S = 60


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def wait_until_it_listens(port: int) -> None:
    end_s = time.monotonic() + START_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert time.monotonic() < end_s, "moto's server does not start"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The query of addresses in a store with images in one bucket, and the empty bucket `rows`."""
    port, log = free_port(), tmp_path_factory.mktemp("moto") / "log"
    command = [str(MOTO), "-H", "127.0.0.1", "-p", str(port)]
    with pytest.MonkeyPatch.context() as patch, Path(log).open("wb") as lines:
        patch.setenv("AWS_ACCESS_KEY_ID", "name")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "word")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        moto = subprocess.Popen(command, stdout=lines, stderr=lines)
        try:
            wait_until_it_listens(port)
            query = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
            files = open_filesystem(f"s3://images{query}&allow_bucket_creation=true")
            files.create_dir("images")
            files.create_dir("rows")
            for key in KEYS:
                with files.open_output_stream(f"images/{key}") as stream:
                    stream.write(key.encode())
            yield query
        finally:
            moto.terminate()
            moto.wait(START_S)


def contents(chunks: list[Chunk]) -> dict[str, bytes | InputError]:
    return dict(one for chunk in chunks for one in read_chunk(chunk))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("images/2026/**/*.jpg", ["2026/0/a.jpg", "2026/1/c.jpg"]),
        ("images/2026/?/[ab].*", ["2026/0/a.jpg", "2026/0/b.png"]),
        ("images/2026/1", ["2026/1/c.jpg"]),
        ("images/2026/0/b.png", ["2026/0/b.png"]),
        ("name:word@images/2026/*/a*", ["2026/0/a.jpg"]),
    ],
)
def test_folders_and_globs(spec: str, expected: list[str], server: str) -> None:
    """Names have neither the login nor where the store is."""
    named = {f"s3://images/{key}": key.encode() for key in expected}
    assert contents(list_images([f"s3://{spec}{server}"])) == named


def test_lists_and_tables(server: str) -> None:
    files = open_filesystem(locate(f"s3://images{server}").address)
    with files.open_output_stream("images/list.txt") as stream:
        stream.write(b"# two\n2026/0/b.png\n2026/1/c.jpg\n")
    assert len(list_images([f"s3://images/list.txt{server}"])) == 1
    expected = {f"s3://images/{key}": key.encode() for key in ("2026/0/b.png", "2026/1/c.jpg")}
    assert contents(list_images([f"s3://images/list.txt{server}"])) == expected

    paths = pa.table({"path": ["2026/0/b.png", "2026/1/c.jpg"]})
    pq.write_table(paths, "images/paths.parquet", filesystem=files)
    assert contents(list_images([f"s3://images/paths.parquet{server}"])) == expected
    absolute = pa.table({"where": [f"s3://images/2026/1/c.jpg{server}"]})
    pq.write_table(absolute, "images/absolute.parquet", filesystem=files)
    listed = list_images([f"s3://images/absolute.parquet{server}"], "where")
    assert contents(listed) == {"s3://images/2026/1/c.jpg": b"2026/1/c.jpg"}

    encoded = pa.table({"path": ["x", None], "bytes": [b"first", b"second"]})
    pq.write_table(encoded, "images/encoded.parquet", filesystem=files)
    listed = list_images([f"s3://images/encoded.parquet{server}"])
    assert contents(listed) == {"x": b"first", "s3://images/encoded.parquet#1": b"second"}


def test_an_image_that_has_gone_is_an_error_of_its_own(server: str) -> None:
    chunk = list_images([f"s3://images/2026/0{server}"])[0]
    gone = Chunk((*chunk.names, "s3://images/2026/0/gone.jpg"), chunk.prefix, chunk.address)
    error = contents([gone])["s3://images/2026/0/gone.jpg"]
    assert isinstance(error, InputError)
    assert "gone.jpg" in str(error)


@pytest.mark.parametrize(
    "spec", ["images/absent", "nowhere/x", "images/*.tif", "name:word@images/y"]
)
def test_nothing_there(spec: str, server: str) -> None:
    with pytest.raises(InputError) as caught:
        list_images([f"s3://{spec}{server}"])
    assert "\n" not in str(caught.value)
    assert ":word@" not in str(caught.value)


def test_rows_are_written_and_resumed(server: str) -> None:
    address = f"s3://rows/first/run{server}"
    output = BatchOutput(address, RUN, resume=False)
    output.begin()
    output.write(rows("a", "b"))
    output.flush()
    with pytest.raises(OutputError, match="--resume"):
        BatchOutput(address, RUN, resume=False)
    again = BatchOutput(address, RUN, resume=True)
    assert again.done == {"a", "b"}
    again.write(rows("c", error="cut"))
    again.flush()
    again.check_complete(["a", "b", "c"])
    assert again.export("jsonl", {}, None) == "s3://rows/first/run/results.jsonl"
    with again._files.open_input_stream("rows/first/run/results.jsonl") as stream:
        lines = stream.read().decode().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["a", "b", "c"]


def test_no_such_bucket_for_rows(server: str) -> None:
    """It is said before a run begins."""
    with pytest.raises(OutputError, match="nowhere"):
        BatchOutput(f"s3://nowhere/run{server}", RUN, resume=False)
    BatchOutput(f"s3://nowhere/run{server}&allow_bucket_creation=true", RUN, resume=False).begin()
