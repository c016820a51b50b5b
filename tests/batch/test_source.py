"""Which images a job reads: folders, globs, lists, tables; each once, dealt out in chunks."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from tood_deploy.batch.source import Chunk, deal_out, list_images, locate, read_chunk
from tood_deploy.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files in two levels, hidden ones and texts among them."""
    for name in ("b.png", "a.jpg", "x/d.png", "x/y/e.JPG", ".hidden.png", "notes.md", "x/[z].png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "images"


def names(chunks: list[Chunk]) -> list[str]:
    return [name for chunk in chunks for name in chunk.names]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", ["a.jpg", "b.png"]),
        ("*.png", ["b.png"]),
        ("**/*.png", ["b.png", "x/[z].png", "x/d.png"]),
        ("x/**/*", ["x/[z].png", "x/d.png", "x/y/e.JPG"]),
        ("x/?.png", ["x/d.png"]),
        ("[ab].*", ["a.jpg", "b.png"]),
        ("[!a].png", ["b.png"]),
        ("x/d.png", ["x/d.png"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_folders_globs_and_addresses(
    spec: str, expected: list[str], prefix: str, folder: Path
) -> None:
    chunks = list_images([f"{prefix}{folder}/{spec}".rstrip("/")])
    assert names(chunks) == [f"{prefix}{folder}/{name}" for name in expected]
    for chunk in chunks:
        for name, data in read_chunk(chunk):
            assert isinstance(data, bytes)
            assert data == Path(name.removeprefix(prefix)).relative_to(folder).as_posix().encode()


def test_relative_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert names(list_images(["images/*.png"])) == [str(folder / "b.png")]
    monkeypatch.chdir(folder)
    assert names(list_images(["*.png"])) == [str(folder / "b.png")]


def test_a_list_names_files_from_its_folder(folder: Path) -> None:
    (folder / "list.txt").write_text(f"# some\n\nx/d.png\n{folder}/a.jpg\nfile://{folder}/b.png\n")
    expected = [f"{folder}/x/d.png", f"{folder}/a.jpg", f"file://{folder}/b.png"]
    assert names(list_images([str(folder / "list.txt")])) == expected


def test_a_list_takes_names_as_they_stand(folder: Path) -> None:
    """As tood-infer does: none is a glob, and what is not there is an error of its own row."""
    (folder / "list.txt").write_text("\ufeffx/[z].png\nabsent.png\n", encoding="utf-8")
    (chunk,) = list_images([str(folder / "list.txt")])
    assert chunk.names == (f"{folder}/x/[z].png", f"{folder}/absent.png")
    present, absent = (data for _, data in read_chunk(chunk))
    assert present == b"x/[z].png"
    assert isinstance(absent, InputError)


def test_what_is_named_twice_is_done_once(folder: Path) -> None:
    assert len(names(list_images([str(folder), f"{folder}/*", f"{folder}/b.png"]))) == 3


def test_a_table_of_paths(folder: Path, tmp_path: Path) -> None:
    paths = ["images/b.png", str(folder / "a.jpg"), None, f"file://{folder}/x/d.png"]
    pq.write_table(pa.table({"url": paths, "id": [1, 2, 3, 4]}), tmp_path / "table.parquet")
    chunks = list_images([str(tmp_path / "table.parquet")], "url")
    expected = [f"{folder}/b.png", f"{folder}/a.jpg", f"file://{folder}/x/d.png"]
    assert names(chunks) == expected
    assert [data for chunk in chunks for _, data in read_chunk(chunk)] == [
        b"b.png",
        b"a.jpg",
        b"x/d.png",
    ]


@pytest.mark.parametrize("named", [True, False])
def test_a_table_of_images(named: bool, tmp_path: Path) -> None:
    data = [b"0", b"1", None, b"3", b"4"]
    columns = {"bytes": pa.array(data, pa.binary())}
    columns |= {"path": [f"{i}.jpg" for i in range(5)]} if named else {}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=2)
    listed = list_images([str(tmp_path)])
    expected = [f"{i}.jpg" if named else f"{tmp_path}/t.parquet#{i}" for i in range(5)]
    assert names(listed) == expected
    chunks = deal_out(listed, 1, {expected[1]})
    assert names(chunks) == [expected[0], *expected[2:]]
    read = dict(pair for chunk in chunks for pair in read_chunk(chunk))
    assert [read[name] for name in (expected[0], *expected[3:])] == [b"0", b"3", b"4"]
    assert isinstance(read[expected[2]], InputError)


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table({"bytes": [b"0", b"1"], "path": ["a.jpg", "a.jpg"]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"a\.jpg"):
        list_images([str(tmp_path / "t.parquet")])


def test_chunks_are_dealt_out_in_order_and_survive_a_dataset(folder: Path) -> None:
    listed = list_images([f"{folder}/**/*"])
    chunks = deal_out(listed, 2)
    assert [len(chunk.names) for chunk in chunks] == [2, 2, 2]
    assert names(chunks) == names(listed)
    assert [Chunk.from_row(chunk.to_row()) for chunk in chunks] == chunks
    assert deal_out(listed, 2, set(names(listed))) == []


def test_an_image_that_has_gone_is_an_error_and_the_rest_is_read(folder: Path) -> None:
    (chunk,) = list_images([str(folder)])
    (folder / "a.jpg").unlink()
    read = dict(read_chunk(chunk))
    assert isinstance(read[str(folder / "a.jpg")], InputError)
    assert read[str(folder / "b.png")] == b"b.png"


def no_table(folder: Path) -> str:
    (folder / "t.parquet").write_bytes(b"PAR1")
    return str(folder / "t.parquet")


def other_columns(folder: Path) -> str:
    pq.write_table(pa.table({"id": [1], "image": [b"x"]}), folder / "t.parquet")
    return str(folder / "t.parquet")


@pytest.mark.parametrize(
    ("spec_of", "reason"),
    [
        (lambda folder: f"{folder}/absent", "no such file"),
        (lambda folder: f"{folder}/*.gif", "no file has such a name"),
        (lambda folder: f"{folder}/x/y/e.JPG/..", "no image"),
        (lambda folder: "nosuch://bucket/a", "no file system"),
        (lambda folder: f"{folder}/absent.txt", "cannot be read as a list"),
        (no_table, "cannot be read as a Parquet table"),
        (other_columns, "--column"),
    ],
)
def test_what_cannot_be_listed(spec_of: Callable[[Path], str], reason: str, folder: Path) -> None:
    (folder / "x" / "y" / "e.JPG").unlink()
    with pytest.raises(InputError, match=reason):
        list_images([spec_of(folder)])


def test_a_column_without_a_table_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="--column"):
        list_images([str(folder)], "url")


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        ("gs://anonymous@bucket/a", "?retry_limit_seconds=20"),
        ("gs://anonymous@bucket/a?scheme=http", "&retry_limit_seconds=20"),
        ("gs://anonymous@bucket/a?retry_limit_seconds=90", ""),
    ],
)
def test_a_store_that_does_not_answer_is_not_asked_for_ever(spec: str, limit: str) -> None:
    where = locate(spec)
    assert where.address == spec + limit
    assert where.name == "gs://bucket/a"
