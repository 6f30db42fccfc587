"""The check that training makes: another tokenizer or length, another cache, a manifest that is not ours."""

import copy
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_convert import LENGTH, english, jsonl, make_tokenizer, plan, run
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from let_composer.data.manifest import check_config, check_manifest, tokenizer_fingerprint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.jsonl").write_bytes(jsonl(english(60_000)))
    run(plan(folder / "a.jsonl", tokenizer, validation=0.1), folder / "out")
    return folder / "out"


def test_fingerprint_is_of_the_table(tmp_path: Path, tokenizer: str) -> None:
    hf = AutoTokenizer.from_pretrained(tokenizer)
    fingerprint = tokenizer_fingerprint(hf)
    hf.save_pretrained(tmp_path / "copy")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "copy")) == fingerprint
    table = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    a, b = "Ġthe", "Ġof"
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(table))
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "copy")) != fingerprint


def test_manifest_is_checked(tmp_path: Path, out: Path, tokenizer: str) -> None:
    shutil.copytree(out, tmp_path / "copy")
    out = tmp_path / "copy"
    hf = AutoTokenizer.from_pretrained(tokenizer)
    check_manifest(str(out / "train"), hf, LENGTH)
    check_manifest(str(out), hf, LENGTH)
    with pytest.raises(ValueError, match="sequences of 64 tokens, but max_seq_len is 128"):
        check_manifest(str(out / "train"), hf, 128)
    other = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "other", 600))
    with pytest.raises(ValueError, match=r"\(700 tokens, sha256:.*\(600 tokens, sha256:"):
        check_manifest(str(out / "train"), other, LENGTH)
    (out / "train" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="max_seq_len is 128"):
        check_manifest(str(out / "train"), hf, 128)
    (out / "manifest.json").unlink()
    check_manifest(str(out / "train"), other, LENGTH * 2)


def test_a_token_added_since_is_in_no_shard(out: Path, tokenizer: str) -> None:
    hf = AutoTokenizer.from_pretrained(tokenizer)
    hf.add_tokens(["<added later>"])
    check_manifest(f"{out}/train/", hf, LENGTH)


@pytest.mark.parametrize("content", ["{", "[1]", '{"name": "an app", "tokenizer": "x"}'])
def test_a_manifest_that_is_not_ours_is_said(tmp_path: Path, tokenizer: str, content: str, caplog: Any) -> None:
    (tmp_path / "manifest.json").write_text(content)
    check_manifest(str(tmp_path), AutoTokenizer.from_pretrained(tokenizer), LENGTH)
    assert f"Neither the tokenizer nor the sequence length of the shards in {tmp_path} was checked" in caplog.text


def test_a_cache_of_other_shards_is_refused(tmp_path: Path, out: Path, tokenizer: str) -> None:
    hf = AutoTokenizer.from_pretrained(tokenizer)
    cache = tmp_path / "cache" / "train"
    cache.mkdir(parents=True)
    check_manifest(str(out / "train"), hf, LENGTH, str(cache))
    index = (out / "train" / "index.json").read_bytes()
    (cache / "index.json").write_bytes(index)
    check_manifest(str(out / "train"), hf, LENGTH, str(cache))
    (cache / "index.json").write_bytes(index.replace(b"xxh128", b"xxh64"))
    with pytest.raises(ValueError, match=rf"{cache} holds the index of other shards than .*rm -r {cache}"):
        check_manifest(str(out / "train"), hf, LENGTH, str(cache))


def config(out: Path, tokenizer: str, **dataset: Any) -> dict[str, Any]:
    data = {"local": str(out), "split": "train", "max_seq_len": LENGTH, **dataset}
    return {"tokenizer": {"name": tokenizer, "kwargs": {}}, "train_loader": {"name": "text", "dataset": data}}


def test_llm_foundry_checks_every_run(tmp_path: Path, out: Path, tokenizer: str) -> None:
    """As the registered transform, which baselines meet, too; on the loaders' streams and the evaluation's."""
    from llmfoundry import registry
    from llmfoundry.utils.config_utils import apply_transforms_to_config

    registry.config_transforms.register("let_composer_manifest", func=check_config)
    good = config(out, tokenizer)
    assert apply_transforms_to_config(copy.deepcopy(good), ["let_composer_manifest"]) == good
    refused = "sequences of 64 tokens, but max_seq_len is 128"
    with pytest.raises(ValueError, match=refused):
        apply_transforms_to_config(config(out, tokenizer, max_seq_len=128), ["let_composer_manifest"])
    streams = {"streams": {"a": {"local": f"{out}/"}}, "max_seq_len": 128}
    with pytest.raises(ValueError, match=refused):
        check_config(config(tmp_path, tokenizer, **streams))
    loaders = [{"label": "x", **config(out, tokenizer, split="val", max_seq_len=128)["train_loader"]}]
    with pytest.raises(ValueError, match=refused):
        check_config({**config(tmp_path / "no shards", tokenizer), "eval_loaders": loaders})
    cache = tmp_path / "cache" / "train"
    cache.mkdir(parents=True)
    (cache / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the index of other shards"):
        check_config(config(out, tokenizer, remote=str(out), local=str(tmp_path / "cache")))
    for untouched in ({}, {"train_loader": {"dataset": {"hf_name": "x"}}}, config(tmp_path, "no such tokenizer")):
        assert check_config(untouched) is untouched


RANK = """
import json, os, sys
os.environ.update(RANK=sys.argv[1], LOCAL_RANK=sys.argv[1], WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", NODE_RANK="0",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
from let_composer.data.manifest import check_config
try:
    check_config(json.loads(sys.argv[3]))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_all_ranks_raise_what_the_first_one_read(out: Path, tokenizer: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    about = json.dumps(config(out, tokenizer, max_seq_len=128))
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, rank, port, about], stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=300)[0] for process in ranks]
    assert said[0] == said[1] and "max_seq_len is 128" in said[0]


def test_manifest_check_is_quick_and_imports_little(tmp_path: Path, tokenizer: str) -> None:
    program = (
        "import sys, let_composer.data.manifest; "
        "print([m for m in ('streaming', 'llmfoundry', 'transformers', 'composer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    words = {f"token-{i}": i for i in range(50_000)}
    large = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="token-0")))
    times = []
    for _ in range(5):
        started = time.process_time()
        tokenizer_fingerprint(large)
        times.append(time.process_time() - started)
    assert min(times) < 0.25
