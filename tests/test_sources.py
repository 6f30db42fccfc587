"""What is found, what is left out, and what is said about it."""

import sys
from pathlib import Path

import pytest

from let_composer.data import DataError
from let_composer.data.sources import list_sources


def test_folders_links_and_names(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for path in ("data/b.jsonl", "data/a [1].jsonl.gz", "data/.hidden.jsonl", "data/notes.txt", "data/.git/c.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    elsewhere.mkdir()
    (elsewhere / "d.parquet").write_text("x")
    (data / "linked").symlink_to(elsewhere)
    (data / "up").symlink_to(data)
    (data / "dangling.jsonl").symlink_to(tmp_path / "nothing")
    sources, left_out = list_sources([str(data)])
    found = [(Path(s.path).relative_to(data).as_posix(), s.kind) for s in sources]
    assert found == [("a [1].jsonl.gz", "gz"), ("b.jsonl", "jsonl"), ("linked/d.parquet", "parquet")]
    assert sorted(line.removeprefix(f"{data}/") for line in left_out) == [
        ".git: hidden",
        ".hidden.jsonl: hidden",
        "dangling.jsonl: a link to nothing",
        "notes.txt: not a format that is read",
        f"up: the same folder as {data}",
    ]
    with pytest.raises(DataError, match=r"dangling\.jsonl is a link to .*nothing, which does not exist"):
        list_sources([str(data / "dangling.jsonl")])
    (data / "dangling.jsonl").unlink()
    assert [s.path for s in list_sources([f"{data}/*.jsonl"])[0]] == [f"{data}/b.jsonl"]
    assert [s.path for s in list_sources([f"{data}/a [1].jsonl.gz"])[0]] == [f"{data}/a [1].jsonl.gz"]
    by_url = [s.path for s in list_sources([f"file://{data}"])[0]]
    assert by_url == [f"file://{s.path}" for s in list_sources([str(data)])[0]]
    with pytest.raises(DataError, match="Named more than once"):
        list_sources([str(data), str(data / "b.jsonl")])


def test_a_store_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"Reading s3://bucket/a\.jsonl needs a package .* pip install s3fs"):
        list_sources(["s3://bucket/a.jsonl"])


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Cannot find hf:some/data:train on the Hugging Face hub.*a connection"):
        list_sources(["hf:some/data:train"])
