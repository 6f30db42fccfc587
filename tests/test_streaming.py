"""Shards as users stream them: an S3-compatible server, several streams, llm-foundry's loader."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from conftest import foundry_yaml
from moto.server import ThreadedMotoServer
from texts import EOS, LENGTH, english, jsonl, leaves_open, plan, run, shards
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from let_composer.data.manifest import read_manifest
from let_composer.data.verify import verify

pytestmark = leaves_open
NAMES = ["Pile-CC", "Github"]


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket of a server that speaks S3, in a thread."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    settings = dict.fromkeys(("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"), url)
    settings |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    settings |= {"AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="pile")
        yield "pile"
    server.stop()


def listing(bucket: str, prefix: str) -> dict[str, Any]:
    pages = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)
    return {entry["Key"].removeprefix(prefix): entry for entry in pages.get("Contents", [])}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bpe: str) -> Namespace:
    file = tmp_path_factory.mktemp("source") / "a.jsonl"
    file.write_bytes(jsonl(english(120_000), lambda i: NAMES[i % 3 == 0]))
    return plan(file, bpe, validation=0.1, by_subset=True, shard_bytes=4_000)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, made: Namespace) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    run(made, out)
    return out


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory, made: Namespace, bucket: str) -> str:
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        run(made, f"s3://{bucket}/shards/")
    assert not list(work.iterdir())
    return f"s3://{bucket}/shards"


def test_upload_and_read_back(tmp_path, bucket, remote, local, made, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = listing(bucket, "shards/")
    assert set(found) == {*shards(local), "streams.yaml"}
    for name, content in shards(local).items():
        assert found[name]["Size"] == len(content), name
    # Nothing can be read before its last shard has arrived, and the whole is announced last.
    for folder in ("pile-cc/train", "github/val"):
        parts = [v["LastModified"] for k, v in found.items() if k.startswith(folder) and "shard." in k]
        assert max(parts) <= found[f"{folder}/index.json"]["LastModified"] <= found["manifest.json"]["LastModified"]
    manifest = json.loads((local / "manifest.json").read_text())
    assert run(made, remote) == manifest
    assert sum(verify(remote).values()) == sum(verify(str(local)).values()) > 20_000
    for written in (f"{remote}/pile-cc/train", f"{remote}//pile-cc//train/"):
        found, why_not = read_manifest(written)
        assert found and found["sequence_length"] == LENGTH, why_not
    assert read_manifest(f"{remote}/nothing-here")[0] is None
    with pytest.raises(ValueError, match="holds shards made otherwise"):
        run(made, remote, validation=0.2)
    run(made, remote, proportions={"Pile-CC": 3, "Github": 1})
    body = boto3.client("s3").get_object(Bucket=bucket, Key="shards/streams.yaml")["Body"].read()
    assert b"proportion: 0.75" in body and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_interrupted_uploads(tmp_path, bucket, local, made, monkeypatch):
    """Killed at a random object (``LET_KILLS=30`` for as many), then a store that is away, then called again."""
    chooser, client = random.Random(5), boto3.client("s3")
    monkeypatch.chdir(tmp_path)
    for kill in range(int(os.environ.get("LET_KILLS", "1"))):
        folder, moment = f"cut-{kill}", chooser.randrange(len(shards(local)))
        remote = f"s3://{bucket}/{folder}"
        process = multiprocessing.get_context("spawn").Process(target=run, args=(made, remote))
        process.start()
        while process.is_alive() and len(listing(bucket, f"{folder}/")) < moment:
            time.sleep(0.01)
        process.kill()
        process.join()
        sent = listing(bucket, f"{folder}/").keys()
        assert "manifest.json" not in sent or shards(local).keys() <= sent  # it is there when all else is
        if kill == 0:
            with monkeypatch.context() as patch, pytest.raises(ValueError, match="Cannot upload to .*call again"):
                patch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
                patch.setenv("AWS_MAX_ATTEMPTS", "1")
                run(made, remote)
            unfinished = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            for _ in range(2):  # made, and there already: it has a name at its end that is the same
                run(made, f"s3://{bucket}/elsewhere/{folder}", proportions={"Pile-CC": 1, "Github": 1})
            assert unfinished == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        run(made, remote)
        names = listing(bucket, f"{folder}/").keys() - {"streams.yaml"}
        found = {name: client.get_object(Bucket=bucket, Key=f"{folder}/{name}")["Body"].read() for name in names}
        assert found == shards(local) and not list(tmp_path.iterdir()), moment


TRAIN = """
import hashlib, json, os, signal, sys, torch
from composer.core import Callback
from llmfoundry import registry
from llmfoundry.command_utils.train import train_from_yaml

class Kill(Callback):
    def batch_end(self, state, logger):
        if os.environ.get("KILL_AFTER") == str(state.timestamp.batch.value):
            os.killpg(0, signal.SIGKILL)

registry.callbacks.register("kill", func=Kill)
folder = sys.argv[1]
def run(name, cache, kill=""):
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    os.setpgid(0, 0)
    os.environ["KILL_AFTER"] = kill
    trainer = train_from_yaml(f"{folder}/run.yaml", [f"run_name={name}", f"variables.cache={folder}/{cache}"])
    losses = [float(loss) for _, loss in trainer.logger.destinations[0].data["loss/train/total"]]
    guided = len(trainer.logger.destinations[0].data.get("let/loss", []))
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.state.model.parameters()))
    with open(f"{folder}/{name}-{cache}.json", "w") as file:
        json.dump({"losses": losses, "guided": guided, "parameters": digest.hexdigest()}, file)
    trainer.close()
    os._exit(0)
print(json.dumps([run("whole", "a"), run("cut", "b", kill="9"), run("cut", "b")]))
"""


@pytest.mark.slow
def test_killed_run_resumes_from_the_server(tmp_path, bpe, remote):
    """LET on two streams from the server, killed between checkpoints, ends bit for bit as a run that was not."""
    torch.manual_seed(1)
    size = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=700, **size)).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(bpe).save_pretrained(tmp_path / "teacher")
    streams = {
        name: {"remote": f"{remote}/{folder}", "local": f"${{variables.cache}}/{name}", "proportion": share}
        for name, folder, share in (("prose", "pile-cc", 0.75), ("code", "github", 0.25))
    }
    dataset = {"local": None, "streams": streams, "cache_limit": "40kb", "validate_hash": "xxh128"}
    changes: dict[str, Any] = {
        "variables": {"cache": "", "data": "", "tokenizer": bpe},
        "model": {"vocab_size": 700, "max_seq_len": LENGTH},
        "max_seq_len": LENGTH,
        "train_loader": {"dataset": {**dataset, "max_seq_len": LENGTH}, "num_workers": 1},
        "eval_loader": None,
        "eval_interval": 0,
        "eval_first": False,
        "algorithms": {"let": {"teacher": str(tmp_path / "teacher"), "weight": 1.0, "stop": "12ba"}},
        "callbacks": {"kill": {}},
        "max_duration": "24ba",
        "save_folder": f"{tmp_path}/${{run_name}}",
        "save_interval": "5ba",
        "autoresume": True,
    }
    foundry_yaml(tmp_path, **changes)
    done = subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0, signal.SIGKILL, 0], done.stderr[-3000:]
    whole, resumed = (json.loads((tmp_path / name).read_text()) for name in ("whole-a.json", "cut-b.json"))
    assert (len(whole["losses"]), whole["guided"], len(resumed["losses"]), resumed["guided"]) == (24, 12, 19, 7)
    assert resumed["losses"] == whole["losses"][5:]
    assert resumed["parameters"] == whole["parameters"]


def test_llm_foundry_reads_the_same_tokens(tmp_path, bpe):
    """The stream is token for token the one of llm-foundry's own converter, and its loader reads ours."""
    import datasets
    from llmfoundry.data import ConcatTokensDataset
    from llmfoundry.data.text_data import build_text_dataloader

    texts = english(150_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(plan(tmp_path / "a.jsonl", bpe, shuffle_seed=None), tmp_path / "out")
    hf, rows = AutoTokenizer.from_pretrained(bpe), datasets.Dataset.from_dict({"text": texts})
    theirs: Any = ConcatTokensDataset(rows, hf, max_length=LENGTH, bos_text="", eos_text=EOS, no_wrap=False)
    expected = np.stack([row["tokens"] for row in theirs])
    config = {"local": str(tmp_path / "out"), "split": "train", "shuffle": False, "max_seq_len": LENGTH}
    build: Any = build_text_dataloader
    spec = build(
        hf, 4, config, drop_last=False, num_workers=0, prefetch_factor=None, persistent_workers=False, pin_memory=False
    )
    read = np.concatenate([batch["input_ids"].numpy() for batch in spec.dataloader])
    assert read.dtype == np.int64 and np.array_equal(read, expected)
