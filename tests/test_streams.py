"""The streams: block, and that streaming samples what it says."""

import json
from typing import Any

import pytest
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from texts import english, jsonl, leaves_open, plan, run

from let_composer.cli import main
from let_composer.data.streams import PILE_WEIGHTS, streams_block

pytestmark = leaves_open


def test_streams_block_is_what_streaming_samples(tmp_path, bpe):
    from omegaconf import OmegaConf
    from streaming import Stream

    names = ["Pile-CC", "ArXiv"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(), lambda i: names[i % 10 == 0]))
    manifest = run(plan(tmp_path / "a.jsonl", bpe, by_subset=True), tmp_path / "out")
    block: Any = OmegaConf.to_container(OmegaConf.load(tmp_path / "out" / "streams.yaml"))
    trains = [manifest["streams"][name]["splits"]["train"] for name in names]
    # The Pile's weights are of bytes: so many tokens as make up that share of them.
    weights = [PILE_WEIGHTS[n] * t["tokens"] / t["bytes"] for n, t in zip(names, trains, strict=True)]
    for weight, key in zip(weights, ("pile-cc", "arxiv"), strict=True):
        assert block["streams"][key]["proportion"] == pytest.approx(weight / sum(weights), rel=1e-4)
    own: Any = OmegaConf.create(streams_block(manifest, str(tmp_path / "out"), {"Pile-CC": 1, "ArXiv": 3}))
    clean_stale_shared_memory()
    data = StreamingDataset(streams=[Stream(**s) for s in own["streams"].values()], batch_size=1, epoch_size=400)
    per_stream = dict(zip(own["streams"], (s.choose for s in data.streams), strict=True))
    assert per_stream == {"arxiv": 300, "pile-cc": 100}
    remote: Any = OmegaConf.create(f"variables: {{cache: /disk}}\n{streams_block(manifest, 's3://bucket/pile')}")
    assert remote["streams"]["arxiv"]["local"] == "/disk/arxiv"
    assert remote["streams"]["arxiv"]["remote"] == "s3://bucket/pile/arxiv"
    with pytest.raises(ValueError, match="No proportion for ArXiv"):
        streams_block(manifest, "out", {"Pile-CC": 1})
    assert sum(PILE_WEIGHTS.values()) == pytest.approx(100)


def test_proportions_reach_the_file_or_stop_the_work(tmp_path, bpe, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(jsonl(english(100_000), lambda i: ["Pile-CC", "ArXiv", "Github"][i % 3]))
    made = plan(source, bpe, by_subset=True)
    run(made, out, proportions={"Pile-CC": 98, "ArXiv": 1, "Github": 1})
    assert "proportion: 0.98\n" in (out / "streams.yaml").read_text()
    run(made, out, proportions={"Pile-CC": 50, "ArXiv": 25, "Github": 25})
    assert "proportion: 0.5\n" in (out / "streams.yaml").read_text()
    with pytest.raises(ValueError, match="No proportion for Github"):
        run(made, tmp_path / "new", proportions={"Pile-CC": 1, "ArXiv": 1})
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="No subset Books in the input, which holds"):
        run(made, out, proportions={"Pile-CC": 1, "ArXiv": 1, "Github": 1, "Books": 1})
    with pytest.raises(ValueError, match="add --by-subset"):
        run(plan(source, bpe), out, proportions={"Pile-CC": 1})
    for wrong in ("ArXiv=0", "ArXiv=inf", "ArXiv"):
        with pytest.raises(SystemExit):
            main(["prepare", str(source), "--out", "x", "--tokenizer", bpe, "--proportions", wrong])
        assert f"weight above 0, such as 'Pile-CC=0.5', got '{wrong}'" in capsys.readouterr().err


def test_documents_without_a_subset_are_counted(tmp_path, bpe, capsys):
    rows = [{"text": text, "meta": ["Pile-CC"] if i % 2 else "Pile-CC"} for i, text in enumerate(english(60_000))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", bpe]
    assert main([*arguments, "--by-subset", "--sequence-length", "64", "--quiet"]) == 0
    said = capsys.readouterr().err
    assert f"unlabelled, without meta.pile_set_name or pile_set_name:\n    train: {{documents: {len(rows)}," in said
