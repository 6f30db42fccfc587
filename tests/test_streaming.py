"""Shards as users stream them: an S3-compatible server, several streams, llm-foundry's loader."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from test_convert import EOS, LENGTH, english, jsonl, make_tokenizer, plan, run, samples, shards
from transformers import AutoTokenizer

from let_composer.data import DataError
from let_composer.data.convert import convert
from let_composer.data.manifest import check_manifest, read_manifest
from let_composer.data.plan import Plan
from let_composer.data.verify import verify

pytestmark = pytest.mark.filterwarnings(
    # streaming and boto3 leave sockets and shared memory to the interpreter's exit.
    "ignore::ResourceWarning",
)
NAMES = ["Pile-CC", "Github"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start an S3-compatible server in a process of its own and make a bucket."""
    beside = str(Path(sys.executable).parent)
    server = shutil.which("moto_server", path=os.pathsep.join([beside, os.environ["PATH"]]))
    if server is None:
        pytest.skip("needs moto_server: pip install 'moto[server]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    process = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    settings = {
        "S3_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(urllib.request.Request(f"{url}/pile", method="PUT"), timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                    time.sleep(0.2)
            yield "pile"
        finally:
            process.kill()
            process.wait()
            log.close()


def listing(bucket: str, prefix: str) -> dict[str, Any]:
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    pages = client.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return {entry["Key"].removeprefix(prefix): entry for entry in pages.get("Contents", [])}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "a.jsonl"
    file.write_bytes(jsonl(english(120_000), lambda i: NAMES[i % 3 == 0]))
    return file


@pytest.fixture(scope="module")
def made(source: Path, tokenizer: str) -> Plan:
    return plan(source, tokenizer, validation=0.1, by_subset=True, shard_bytes=4_000)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, made: Plan) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    run(made, out)
    return out


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory, made: Plan, bucket: str) -> str:
    work = tmp_path_factory.mktemp("work")
    convert(made, f"s3://{bucket}/shards/", workers=2, work=str(work), progress=False)
    assert not list(work.iterdir())
    return f"s3://{bucket}/shards"


def test_upload_and_read_back(
    tmp_path: Path, tokenizer: str, bucket: str, remote: str, local: Path, made: Plan
) -> None:
    found = listing(bucket, "shards/")
    assert set(found) == {*shards(local), "streams.yaml"}
    for name, content in shards(local).items():
        assert found[name]["Size"] == len(content), name
    # Nothing can be read before its last shard has arrived, and the whole is announced last.
    for folder in ("pile-cc/train", "github/val"):
        parts = [v["LastModified"] for k, v in found.items() if k.startswith(folder) and "shard." in k]
        assert max(parts) <= found[f"{folder}/index.json"]["LastModified"] <= found["manifest.json"]["LastModified"]
    manifest = json.loads((local / "manifest.json").read_text())
    assert convert(made, remote, workers=2, progress=False) == manifest
    assert sum(verify(remote, 0).values()) == sum(verify(str(local), 0).values()) > 20_000
    hf = AutoTokenizer.from_pretrained(tokenizer)
    for written in (f"{remote}/pile-cc/train", f"{remote}//pile-cc//train/"):
        found, why_not = read_manifest(written)
        assert found and found["sequence_length"] == LENGTH, why_not
    assert read_manifest(f"{remote}/nothing-here")[0] is None
    cache = tmp_path / "train"
    cache.mkdir()
    (cache / "index.json").write_bytes((local / "github" / "train" / "index.json").read_bytes())
    for name in ("github", "pile-cc"):
        found, _ = read_manifest(f"{remote}/{name}/train")
        with pytest.raises(ValueError, match="other shards") if name != "github" else contextlib.nullcontext():
            check_manifest(found or {}, f"{remote}/{name}/train", hf, LENGTH, str(cache))
    with pytest.raises(DataError, match="holds shards made otherwise"):
        convert(dataclasses.replace(made, validation=0.2), remote, workers=1, progress=False)


UPLOAD = """
import sys
from let_composer.data.convert import convert
from let_composer.data.plan import Plan
source, tokenizer, out, work = sys.argv[1:]
plan = Plan((source,), tokenizer, 64, 0.1, by_subset=True, piece_bytes=40_000, shard_bytes=4_000)
convert(plan, out, workers=2, work=work, progress=False)
"""


@pytest.mark.slow
def test_interrupted_uploads(
    tmp_path: Path, source: Path, tokenizer: str, bucket: str, local: Path, made: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at a random object (``LET_KILLS=30`` for as many), and with a store that goes away before the end."""
    remote, work = f"s3://{bucket}/cut", str(tmp_path / "work")
    chooser = random.Random(5)
    for _ in range(int(os.environ.get("LET_KILLS", "1"))):
        command = [sys.executable, "-c", UPLOAD, str(source), tokenizer, remote, work]
        process = subprocess.Popen(command)
        moment = chooser.randrange(len(shards(local)))
        while process.poll() is None and len(listing(bucket, "cut/")) < moment:
            time.sleep(0.01)
        process.kill()
        process.wait()
        sent = listing(bucket, "cut/").keys()
        assert "manifest.json" not in sent or shards(local).keys() <= sent  # it is there when all else is
    with monkeypatch.context() as patch, pytest.raises(DataError, match="Cannot upload to .*call again"):
        patch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        convert(made, remote, workers=2, work=work, progress=False)
    convert(made, remote, workers=2, work=work, progress=False)
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    found = {key: client.get_object(Bucket=bucket, Key=f"cut/{key}")["Body"].read() for key in listing(bucket, "cut/")}
    del found["streams.yaml"]
    assert found == shards(local) and not list((tmp_path / "work").glob("*.partial"))


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
YAML = """
variables: {{cache: none}}
model:
  name: mpt_causal_lm
  d_model: 32
  n_heads: 2
  n_layers: 4
  expansion_ratio: 2
  max_seq_len: 64
  vocab_size: 700
  attn_config: {{attn_impl: torch}}
  loss_fn: torch_crossentropy
tokenizer: {{name: {tokenizer}, kwargs: {{model_max_length: 64}}}}
max_seq_len: 64
train_loader:
  name: text
  dataset:
    streams:
      prose: {{remote: "{remote}/pile-cc", local: "${{variables.cache}}/prose", split: train, proportion: 0.75}}
      code: {{remote: "{remote}/github", local: "${{variables.cache}}/code", split: train, proportion: 0.25}}
    cache_limit: 40kb
    validate_hash: xxh128
    shuffle: true
    shuffle_seed: 17
    max_seq_len: 64
  drop_last: true
  num_workers: 1
scheduler: {{name: cosine_with_warmup, t_warmup: 2ba, alpha_f: 0.1}}
optimizer: {{name: decoupled_adamw, lr: 1.0e-3, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.0}}
algorithms:
  let: {{teacher: {teacher}, weight: 1.0, stop: 12ba}}
callbacks: {{kill: {{}}}}
max_duration: 24ba
eval_interval: 0
global_train_batch_size: 8
device_train_microbatch_size: 4
precision: fp32
seed: 17
save_folder: {folder}/${{run_name}}
save_interval: 5ba
autoresume: true
loggers: {{inmemory: {{}}}}
"""


@pytest.mark.slow
def test_killed_run_resumes_from_the_server(tmp_path: Path, tokenizer: str, bucket: str, remote: str) -> None:
    """LET on two streams from the server, killed between checkpoints, ends bit for bit as a run that was not."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    size = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=700, **size)).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "teacher")
    settings = {"tokenizer": tokenizer, "remote": remote, "teacher": tmp_path / "teacher", "folder": tmp_path}
    (tmp_path / "run.yaml").write_text(YAML.format(**settings))
    done = subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0, signal.SIGKILL, 0], done.stderr[-3000:]
    whole, resumed = (json.loads((tmp_path / name).read_text()) for name in ("whole-a.json", "cut-b.json"))
    assert (len(whole["losses"]), whole["guided"], len(resumed["losses"]), resumed["guided"]) == (24, 12, 19, 7)
    assert resumed["losses"] == whole["losses"][5:]
    assert resumed["parameters"] == whole["parameters"]
    # More came from the server than the cache may hold.
    cached = sum(path.stat().st_size for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert (
        cached
        < 50_000
        < sum(entry["Size"] for key, entry in listing(bucket, "shards/").items() if "train/" in key and "shard." in key)
    )


def test_llm_foundry_reads_the_same_tokens(tmp_path: Path, tokenizer: str) -> None:
    """The stream is token for token the one of llm-foundry's own converter, and its loader reads ours."""
    import datasets
    from llmfoundry.data import ConcatTokensDataset
    from llmfoundry.data.text_data import build_text_dataloader
    from streaming.base.util import clean_stale_shared_memory

    texts = english(150_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(plan(tmp_path / "a.jsonl", tokenizer, piece_bytes=1 << 20), tmp_path / "out")
    hf = AutoTokenizer.from_pretrained(tokenizer)
    theirs: Any = ConcatTokensDataset(
        hf_dataset=datasets.Dataset.from_dict({"text": texts}),
        tokenizer=hf,
        max_length=LENGTH,
        bos_text="",
        eos_text=EOS,
        no_wrap=False,
    )
    expected = [row["tokens"] for row in theirs]
    ours = samples(tmp_path / "out" / "train")
    assert np.array_equal(np.stack(ours), np.stack(expected))
    clean_stale_shared_memory()
    config = {
        "local": str(tmp_path / "out"),
        "remote": None,
        "split": "train",
        "shuffle": False,
        "max_seq_len": LENGTH,
    }
    build: Any = build_text_dataloader
    spec = build(
        hf, 4, config, drop_last=False, num_workers=0, prefetch_factor=None, persistent_workers=False, pin_memory=False
    )
    read = np.concatenate([batch["input_ids"].numpy() for batch in spec.dataloader])
    assert read.dtype == np.int64 and np.array_equal(read, np.stack(expected))
