"""What is found, what is left out, and what is said about it."""

import contextlib
import functools
import http.server
import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import HfFileSystem
from huggingface_hub.utils import reset_sessions

from let_composer.data.sources import list_sources, read_pieces


def test_folders_links_and_names(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for path in ("b.jsonl", "sub/c.jsonl", "a [1].jsonl.gz", ".hidden.jsonl", "notes.txt", ".git/c.jsonl"):
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_text("x")
    elsewhere.mkdir()
    (elsewhere / "d.parquet").write_text("long")
    (data / "linked.parquet").symlink_to(elsewhere / "d.parquet")
    every = [f"{data}/{name}" for name in ("a [1].jsonl.gz", "b.jsonl", "linked.parquet", "sub/c.jsonl")]
    sources, left_out = list_sources([str(data)])
    assert list(sources) == every and sources[every[2]]["bytes"] == 4
    assert left_out == {"hidden": 2, "of no format that is read": 1}
    for name, found in (
        (f"file://{data}", every),
        (f"{data}/**", every),
        (f"{data}/*.jsonl", [f"{data}/b.jsonl"]),
        (f"{data}/*/*.jsonl", [f"{data}/sub/c.jsonl"]),
        (f"{data}/a [1].jsonl.gz", every[:1]),
    ):
        assert list(list_sources([name])[0]) == found
    with pytest.raises(ValueError, match="Named more than once"):
        list_sources([str(data), str(data / "b.jsonl")])
    with pytest.raises(ValueError, match=r"Nothing to read at .*nothing\.jsonl"):
        list_sources([str(data / "nothing.jsonl")])
    (data / "more").symlink_to(elsewhere)
    (data / "up").symlink_to(data)
    sources, left_out = list_sources([str(data)])
    assert list(sources) == [*every[:3], f"{data}/more/d.parquet", every[3]]
    assert left_out["links to a folder that is read"] == 1
    (data / "dangling.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"Cannot list {data}: {data}/dangling.jsonl leads to {tmp_path}/nothing"):
        list_sources([str(data)])


def test_a_file_on_the_web_is_not_read_to_list_it(tmp_path):
    """A page of links is a folder; a file is none, whatever is in it."""
    text = b'{"text": "<a href=\'more.jsonl\'>"}\n'
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(text * 500_000)
    (tmp_path / "sub" / "b.jsonl").write_bytes(text)
    sent = []

    class Web(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source: Any, outputfile: Any) -> None:
            with contextlib.suppress(OSError):  # it is enough to see that the file is there
                while block := source.read(1 << 16):
                    outputfile.write(block)
                    sent.append(len(block))

        def log_message(self, *_: Any) -> None:
            pass

    with serve(functools.partial(Web, directory=str(tmp_path))) as url:
        sources, _ = list_sources([f"{url}/a.jsonl"])
        assert sources.keys() == {f"{url}/a.jsonl"} and sources[f"{url}/a.jsonl"]["bytes"] == len(text) * 500_000
        assert sum(sent) < 5e6
        assert list(list_sources([f"{url}/"])[0]) == [f"{url}/a.jsonl", f"{url}/sub/b.jsonl"]
        (piece,) = read_pieces(f"{url}/sub/b.jsonl", 1 << 20, "text")
    assert piece.payload == text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/a.jsonl", "Install s3fs"),
        ("nosuch://bucket/a.jsonl", "Protocol not known: nosuch"),
        ("hf://datasets/some/data/en", "(offline mode|Max retries)"),
    ],
)
def test_a_store_that_cannot_be_listed(monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"Cannot list {name}: .*{message}"):
        list_sources([name])


@contextlib.contextmanager
def serve(handler: Any) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as reading a data set takes: two commits, of which only the present one is served."""

    commit, lines = "a" * 40, b'{"text": "one"}\n{"text": "two"}\n'
    files = {"en": "directory", "en/a.jsonl": "file", "fr": "directory", "fr/forbidden.parquet": "file"}

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        what, revision, *place = url.path.removeprefix("/api").split("/")[4:] or ["", "main"]
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        entries = [
            {"type": kind, "path": path, "size": len(self.lines), "oid": self.commit}
            for path, kind in self.files.items()
            if path.startswith("/".join([*place, ""]).lstrip("/")) and path in form.get("paths", [path])
        ]
        answer: Any = entries if what in ("tree", "paths-info") else {"id": "some/data", "sha": self.commit}
        found = revision in (self.commit, "main") and (what != "tree" or entries)
        body = json.dumps(answer if found else {}).encode()
        if what == "resolve":
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            body = self.lines[int(first) : int(last) + 1]
        forbidden = what == "resolve" and "forbidden" in url.path
        self.send_response(403 if forbidden else 200 if found else 404)
        if what == "tree" and not found:  # what find asks of a file
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serve(Hub) as endpoint:
        files = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        reset_sessions()
        HfFileSystem.clear_instance_cache()
        yield endpoint
    reset_sessions()
    HfFileSystem.clear_instance_cache()


def test_a_hub_data_set_is_read_at_one_commit(hub, monkeypatch):
    for name in ("hf://datasets/some/data/en", "hf://datasets/some/data/en/*.jsonl"):
        sources, _ = list_sources([name])
        (source,) = sources
        assert source == f"hf://datasets/some/data@{'a' * 40}/en/a.jsonl"
    assert [piece.payload for piece in read_pieces(source, 1 << 20, "text")] == [Hub.lines]
    monkeypatch.setattr(Hub, "commit", "b" * 40)
    with pytest.raises(ValueError, match=f"Cannot read {source}: 404"):  # not the other commit's content
        list(read_pieces(source, 1 << 20, "text"))
    assert list_sources([name])[0] != sources  # so a continued call is refused


def test_a_store_that_fails_is_not_taken_for_a_damaged_file(hub):
    (source,) = list_sources(["hf://datasets/some/data/fr"])[0]
    with pytest.raises(ValueError, match=rf"(?s)Cannot read {source}: 403 .*call again"):
        list(read_pieces(source, 1 << 20, "text"))
