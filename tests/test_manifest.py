"""The check that training makes: another tokenizer or length, another cache, a manifest that is not ours."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from llmfoundry import registry
from llmfoundry.utils.config_utils import apply_transforms_to_config
from texts import LENGTH, english, jsonl, plan, run
from transformers import AutoTokenizer

from let_composer.data.manifest import check_config


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, bpe: str) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.jsonl").write_bytes(jsonl(english(60_000)))
    run(plan(folder / "a.jsonl", bpe, validation=0.1), folder / "out")
    return folder / "out"


def config(out: Path, tokenizer: Any, **dataset: Any) -> dict[str, Any]:
    data = {"local": str(out), "split": "train", "max_seq_len": LENGTH, **dataset}
    return {"tokenizer": {"name": str(tokenizer), "kwargs": {}}, "train_loader": {"name": "text", "dataset": data}}


def test_manifest_is_checked(tmp_path, out, bpe, caplog):
    hf = AutoTokenizer.from_pretrained(bpe)
    hf.add_tokens(["<added later>"])  # is in no shard
    hf.save_pretrained(tmp_path / "copy")
    for split in ("train", "", "train/"):
        check_config(config(out, tmp_path / "copy", split=split))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    file = tmp_path / "copy" / "tokenizer.json"
    table = json.loads(file.read_text())
    vocab = table["model"]["vocab"]
    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    file.write_text(json.dumps(table))
    registry.tokenizers.register("own", func=lambda **_: AutoTokenizer.from_pretrained(tmp_path / "copy"))
    own = config(out, "own")
    own["tokenizer"]["note"] = "llm-foundry reads no other key than name and kwargs"
    for wrong in (config(out, tmp_path / "copy"), own):
        with pytest.raises(ValueError, match=r"\(700 tokens, sha256:.*\(701 tokens, sha256:.*other text"):
            check_config(wrong)


@pytest.mark.parametrize("content", ["{", "[1]", '{"name": "an app", "tokenizer": "x"}', None])
def test_a_manifest_that_is_not_there_or_not_ours_is_said(tmp_path, bpe, content, caplog):
    (tmp_path / "train").mkdir()
    if content:
        (tmp_path / "train" / "manifest.json").write_text(content)
    check_config(config(tmp_path, bpe))
    why = "its manifest.json cannot be read as one of let-composer prepare" if content else "there is no manifest.json"
    said = f"Whether the shards in {tmp_path}/train fit the run's tokenizer and length is unknown: {why}"
    assert said in caplog.text


def test_a_cache_of_other_shards_is_refused(tmp_path, out, bpe):
    cache, index = tmp_path / "cache" / "train" / "index.json", (out / "train" / "index.json").read_bytes()
    cached = config(out, bpe, remote=str(out), local=str(tmp_path / "cache"))
    check_config(cached)
    cache.parent.mkdir(parents=True)
    cache.write_bytes(index)
    check_config(cached)
    cache.write_bytes(index.replace(b"xxh128", b"xxh64"))
    with pytest.raises(ValueError, match=rf"{cache.parent} holds the index of other shards .*rm -r {cache.parent}"):
        check_config(cached)


def test_llm_foundry_checks_every_run(tmp_path, out, bpe):
    """As the registered transform, which baselines meet, too; on the loaders' streams and the evaluation's."""
    registry.config_transforms.register("let_composer_manifest", func=check_config)
    good = config(out, bpe)
    assert apply_transforms_to_config(copy.deepcopy(good), ["let_composer_manifest"]) == good
    streams = {"streams": {"a": {"local": f"{out}/"}}, "max_seq_len": 128}
    loaders = [{"label": "x", **config(out, bpe, split="val", max_seq_len=128)["train_loader"]}]
    for wrong in (
        config(out, bpe, max_seq_len=128),
        config(tmp_path, bpe, **streams),
        {**config(tmp_path / "no shards", bpe), "eval_loaders": loaders},
    ):
        with pytest.raises(ValueError, match="sequences of 64 tokens, but max_seq_len is 128"):
            apply_transforms_to_config(wrong, ["let_composer_manifest"])
    for untouched in ({}, {"train_loader": {"dataset": {"hf_name": "x"}}}, config(tmp_path, "no such tokenizer")):
        assert check_config(untouched) is untouched
