"""What is found, what is left out, and what is said about it."""

import http.server
import json
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfFileSystem
from huggingface_hub.utils import reset_sessions

from let_composer.data import DataError
from let_composer.data.sources import list_sources, read_pieces


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
    assert [Path(s).relative_to(data).as_posix() for s in sources] == ["a [1].jsonl.gz", "b.jsonl", "linked/d.parquet"]
    assert left_out == {
        "hidden": 2,
        "links to a folder that is read": 1,
        "links to nothing": 1,
        "of no format that is read": 1,
    }
    with pytest.raises(DataError, match=r"Nothing to read at .*dangling\.jsonl"):
        list_sources([str(data / "dangling.jsonl")])
    (data / "dangling.jsonl").unlink()
    for name, found in ((f"{data}/*.jsonl", "b.jsonl"), (f"{data}/a [1].jsonl.gz", "a [1].jsonl.gz")):
        assert [*list_sources([name])[0]] == [f"{data}/{found}"]
    assert list_sources([f"file://{data}"])[0] == sources
    with pytest.raises(DataError, match="Named more than once"):
        list_sources([str(data), str(data / "b.jsonl")])


def test_a_store_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"Cannot list s3://bucket/a\.jsonl: Install s3fs"):
        list_sources(["s3://bucket/a.jsonl"])
    with pytest.raises(DataError, match="Cannot list nosuch://.*Protocol not known: nosuch"):
        list_sources(["nosuch://bucket/a.jsonl"])


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Cannot list hf://datasets/some/data/en: .*(offline mode|Max retries)"):
        list_sources(["hf://datasets/some/data/en"])


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as reading a data set takes: two commits, of which only the present one is served."""

    commit, lines = "a" * 40, b'{"text": "one"}\n{"text": "two"}\n'

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        what, revision, *place = url.path.removeprefix("/api").split("/")[4:] or ["", "main"]
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        entries = [
            {"type": kind, "path": path, "size": len(self.lines), "oid": self.commit}
            for path, kind in {"en": "directory", "en/a.jsonl": "file"}.items()
            if path.startswith("/".join([*place, ""]).lstrip("/")) and path in form.get("paths", [path])
        ]
        answer: Any = entries if what in ("tree", "paths-info") else {"id": "some/data", "sha": self.commit}
        body = json.dumps(answer).encode()
        if what == "resolve":
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            body = self.lines[int(first) : int(last) + 1]
        self.send_response(200 if revision in (self.commit, "main") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_a_hub_data_set_is_read_at_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    files = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reset_sessions()
    HfFileSystem.clear_instance_cache()
    try:
        for name in ("hf://datasets/some/data/en", "hf://datasets/some/data/en/*.jsonl"):
            sources, _ = list_sources([name])
            (source,) = sources
            assert source == f"hf://datasets/some/data@{'a' * 40}/en/a.jsonl"
        assert [piece.payload for piece in read_pieces(source, 1 << 20, "text")] == [Hub.lines]
        monkeypatch.setattr(Hub, "commit", "b" * 40)
        with pytest.raises(OSError, match="404"):  # not the other commit's content
            list(read_pieces(source, 1 << 20, "text"))
        assert list_sources([name])[0] != sources  # so a continued call is refused
    finally:
        server.shutdown()
        server.server_close()
        reset_sessions()
        HfFileSystem.clear_instance_cache()
