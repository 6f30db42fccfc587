"""Shards read back: damage and wrong counts are found, and a running loader is left alone."""

import json

import pytest
from streaming import StreamingDataset
from texts import LENGTH, jsonl, leaves_open, plan, run

from let_composer.data.verify import verify

pytestmark = leaves_open


def test_verify(tmp_path, bpe, capsys):
    text = "A sentence that the screen will show. "
    (tmp_path / "a.jsonl").write_bytes(jsonl([text * 40] * 30))
    out = tmp_path / "out"
    manifest = run(plan(tmp_path / "a.jsonl", bpe), out)
    loader = StreamingDataset(local=str(out / "train"), batch_size=1)
    assert verify(str(out)) == {f"{out}/train": manifest["streams"][""]["splits"]["train"]["tokens"]}
    assert text in capsys.readouterr().out
    assert len(list(loader)) == len(loader)  # its shared memory is still there
    for path in (out / "train").rglob("*.mds"):
        path.unlink()
    shard = sorted((out / "train").rglob("*.zstd"))[0]
    good = shard.read_bytes()
    shard.write_bytes(good[:-40] + bytes(40))
    with pytest.raises(ValueError, match="cannot be read back"):
        verify(str(out))
    shard.write_bytes(good)
    changed = json.loads((out / "train" / "manifest.json").read_text())
    changed["streams"][""]["splits"]["train"]["tokens"] += LENGTH
    (out / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="the manifest says"):
        verify(str(out))
    with pytest.raises(ValueError, match=r"Nothing to verify in .*: there is no manifest\.json"):
        verify(str(tmp_path))
