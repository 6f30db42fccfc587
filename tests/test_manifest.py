"""The check that training makes: another tokenizer or length, another cache, a manifest that is not ours."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from texts import LENGTH, english, jsonl, plan, run
from transformers import AutoTokenizer

from let_composer.data.manifest import check_config, check_manifest, read_manifest


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, bpe: str) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.jsonl").write_bytes(jsonl(english(60_000)))
    run(plan(folder / "a.jsonl", bpe, validation=0.1), folder / "out")
    return folder / "out"


def check(folder: Path | str, *about: Any) -> None:
    manifest, why_not = read_manifest(str(folder))
    assert manifest, why_not
    check_manifest(manifest, str(folder), *about)


def test_manifest_is_checked(tmp_path: Path, out: Path, bpe: str) -> None:
    hf = AutoTokenizer.from_pretrained(bpe)
    check(out / "train", hf, LENGTH)
    check(out, hf, LENGTH)
    with pytest.raises(ValueError, match="sequences of 64 tokens, but max_seq_len is 128"):
        check(out / "train", hf, 128)
    hf.save_pretrained(tmp_path / "copy")
    check(out, AutoTokenizer.from_pretrained(tmp_path / "copy"), LENGTH)
    file = tmp_path / "copy" / "tokenizer.json"
    table = json.loads(file.read_text())
    vocab = table["model"]["vocab"]
    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"\(700 tokens, sha256:.*\(700 tokens, sha256:.*other text"):
        check(out / "train", AutoTokenizer.from_pretrained(tmp_path / "copy"), LENGTH)


def test_a_token_added_since_is_in_no_shard(out: Path, bpe: str) -> None:
    hf = AutoTokenizer.from_pretrained(bpe)
    hf.add_tokens(["<added later>"])
    check(f"{out}/train/", hf, LENGTH)


@pytest.mark.parametrize("content", ["{", "[1]", '{"name": "an app", "tokenizer": "x"}', None])
def test_a_manifest_that_is_not_there_or_not_ours_is_said(
    tmp_path: Path, bpe: str, content: str | None, caplog: Any
) -> None:
    (tmp_path / "train").mkdir()
    if content:
        (tmp_path / "train" / "manifest.json").write_text(content)
    check_config(config(tmp_path, bpe))
    why = "its manifest.json (is not|cannot be read as) one of let-composer" if content else "there is no manifest.json"
    said = f"Neither the tokenizer nor the sequence length of the shards in {tmp_path}/train was checked: {why}"
    assert re.search(said, caplog.text)


def test_a_cache_of_other_shards_is_refused(tmp_path: Path, out: Path, bpe: str) -> None:
    hf = AutoTokenizer.from_pretrained(bpe)
    cache = tmp_path / "cache" / "train"
    cache.mkdir(parents=True)
    check(out / "train", hf, LENGTH, str(cache))
    index = (out / "train" / "index.json").read_bytes()
    (cache / "index.json").write_bytes(index)
    check(out / "train", hf, LENGTH, str(cache))
    (cache / "index.json").write_bytes(index.replace(b"xxh128", b"xxh64"))
    with pytest.raises(ValueError, match=rf"{cache} holds the index of other shards than .*rm -r {cache}"):
        check(out / "train", hf, LENGTH, str(cache))


def config(out: Path, bpe: str, **dataset: Any) -> dict[str, Any]:
    data = {"local": str(out), "split": "train", "max_seq_len": LENGTH, **dataset}
    return {"tokenizer": {"name": bpe, "kwargs": {}}, "train_loader": {"name": "text", "dataset": data}}


def test_llm_foundry_checks_every_run(tmp_path: Path, out: Path, bpe: str) -> None:
    """As the registered transform, which baselines meet, too; on the loaders' streams and the evaluation's."""
    from llmfoundry import registry
    from llmfoundry.utils.config_utils import apply_transforms_to_config

    registry.config_transforms.register("let_composer_manifest", func=check_config)
    good = config(out, bpe)
    assert apply_transforms_to_config(copy.deepcopy(good), ["let_composer_manifest"]) == good
    refused = "sequences of 64 tokens, but max_seq_len is 128"
    with pytest.raises(ValueError, match=refused):
        apply_transforms_to_config(config(out, bpe, max_seq_len=128), ["let_composer_manifest"])
    streams = {"streams": {"a": {"local": f"{out}/"}}, "max_seq_len": 128}
    with pytest.raises(ValueError, match=refused):
        check_config(config(tmp_path, bpe, **streams))
    loaders = [{"label": "x", **config(out, bpe, split="val", max_seq_len=128)["train_loader"]}]
    with pytest.raises(ValueError, match=refused):
        check_config({**config(tmp_path / "no shards", bpe), "eval_loaders": loaders})
    cache = tmp_path / "cache" / "train"
    cache.mkdir(parents=True)
    (cache / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the index of other shards"):
        check_config(config(out, bpe, remote=str(out), local=str(tmp_path / "cache")))
    for untouched in ({}, {"train_loader": {"dataset": {"hf_name": "x"}}}, config(tmp_path, "no such tokenizer")):
        assert check_config(untouched) is untouched


def test_the_check_imports_little() -> None:
    program = (
        "import sys, let_composer.data.manifest; "
        "print([m for m in ('streaming', 'llmfoundry', 'transformers', 'composer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
