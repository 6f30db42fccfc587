"""Every GPU measurement of the project behind one command: tests, kernels, steps, runs. One page comes out.

    python scripts/benchmarks/gpu_report.py --gpu h100 --minutes 9 --archive runs/gpu_report.tar.gz [--only tests loss]
    python scripts/benchmarks/gpu_report.py --rehearse      # the whole chain at toy size on a CPU, in a few minutes

Each part is a program of its own with a time limit. What it leaves in OUT is kept, and a part that has succeeded with
these sources on this device is not run again. The loss benchmark and the evidence go on where they were cut off. After
every part OUT/report.md, OUT/report.json and the archive are rewritten; carry the archive to the next machine, and the
same command goes on there. It has no weights, so the evidence begins anew there. The evidence needs the data that
yamls/evidence/evidence_125m.yaml tells how to make.
"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, machine

__all__ = ["main", "parts", "run", "save", "toy_data"]

DATA = Path("data/evidence/shards")  # of yamls/evidence/evidence_125m.yaml
LIMIT = 420  # seconds for a part, so that one that hangs does not take all the time
REST = "evidence-125m"  # the last part has no such limit: it fills whatever time is left
GRACE = 20  # seconds between asking a part to end and ending it
LOCAL = ("/huggingface", ".done", ".begun")  # left out of the archive: weights are too large, and marks need them
# Without flash-attn, as on machines that offer nothing but the stack's pure Python parts.
PLAIN = "variables.attention=torch variables.loss_fn=torch_crossentropy"
SMALL = (
    "model.d_model=64 model.n_heads=2 model.n_layers=4 model.ffn_config.ffn_hidden_size=128 precision=fp32"
    " global_train_batch_size=2 device_train_microbatch_size=1"
)


def parts(out: Path, gpu: str, flash: bool, memory_gib: float, rehearse: bool = False) -> dict[str, str]:
    """What Python is to run, by name, most wanted first. Without flash-attn attention keeps ``[S, S]`` matrices, so
    batches are small. What a rehearsal appends overrules what stands before it."""
    to, small = shlex.quote(str(out)), 8 if flash else 2
    tests = "-m pytest -m gpu -q -W ignore -p no:cacheprovider"
    tests += " -n auto --maxprocesses 8" if importlib.util.find_spec("xdist") else ""

    def loss(options: str = "") -> str:
        toy = "--device cpu --pairs 48/24 --tokens 8 --repeats 2" if rehearse else ""
        return f"scripts/benchmarks/loss.py --out {{}} {options} {toy}"

    def step(size: str, batch: int, micro: int | str) -> str:
        command = f"scripts/benchmarks/step.py yamls/let_{size}.yaml --gpu {gpu} --out {{}} {'' if flash else PLAIN}"
        command += f" global_train_batch_size={batch} device_train_microbatch_size={micro}"
        toy = f"{SMALL} max_seq_len=32 algorithms.let.teacher=EleutherAI/pythia-14m --rounds 2 --steps 3"
        return f"{command} {toy if rehearse else ''}"

    found = {
        "kernel-tests": f"{tests} tests/test_kernels.py",
        "loss": loss(),
        "step-1b4": step("1b4", 2 * small, small),
        "trainer-tests": f"{tests} tests/test_gpu.py",
        "loss-teacher": loss("--resize teacher"),
        "step-125m": step("125m", 32, 16),
        "step-1b4-auto": step("1b4", 4 * small, "auto"),
        "loss-normalized": loss("--normalize --pairs 2048/768 4096/2048"),
        "loss-fp32": loss("--dtype float32 --pairs 2048/768 4096/2048"),
    }
    if memory_gib > 100 or rehearse:  # weights and gradients in fp32, weights in bf16: 65 GiB before activations
        found["step-7b"] = step("7b", 4 if flash else 2, 2 if flash else 1)
    if (ROOT / DATA).exists() or rehearse:
        found[REST] = "scripts/evidence/sweep.py yamls/evidence/evidence_125m.yaml --workers 1 --runs {}"
        found[REST] += " variables.attention=flash" if flash else ""
        toy = f" {SMALL} model.vocab_size=512 max_seq_len=64 max_duration=4ba eval_interval=2ba"
        toy += " device_eval_batch_size=1 eval_subset_num_batches=1"
        toy += f" variables.data_local={to}/toy/shards variables.tokenizer={to}/toy/teacher"
        toy += f" variables.pretrained={to}/toy/teacher --only baseline pretrained"
        found[REST] += toy if rehearse else ""
    # {} is a name of the part's own.
    return {name: command.format(f"{to}/{name}") for name, command in found.items()}


def toy_data(out: Path, vocabulary: int = 512, length: int = 64) -> None:
    """Write OUT/teacher, with its tokenizer, and OUT/shards, of random tokens, for the rehearsal of the evidence."""
    import numpy as np
    from streaming import MDSWriter
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(vocabulary, 32, 64, 2, 2, max_position_embeddings=length)  # then width, MLP, blocks, heads
    LlamaForCausalLM(config).save_pretrained(out / "teacher")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    tokenizer.save_pretrained(out / "teacher")
    columns = {"tokens": f"ndarray:uint16:{length}"}
    for split in ("train", "val"):  # not by let-composer prepare, whose backports.zstd is not on every GPU machine
        with MDSWriter(out=str(out / "shards" / split), columns=columns, exist_ok=True) as writer:
            for row in np.random.default_rng(0).integers(0, vocabulary, (400, length), np.uint16):
                writer.write({"tokens": row})


def run(command: str, log: Path, seconds: float) -> dict[str, Any]:
    """Have Python run a command, for so many seconds at most, and keep its output."""
    start = time.time()
    variables = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "GIT_PYTHON_REFRESH": "quiet",  # llm-foundry imports GitPython, which raises where there is no git
    }
    # timeout ends the command with what it started, which would hold the device's memory.
    limited = ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(seconds - GRACE), sys.executable]
    limited += shlex.split(command)
    with open(log, "w") as file:
        process = subprocess.Popen(limited, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C does not reach what timeout has started, but this does
        process.terminate()
        process.wait()
        raise
    return {
        "command": f"python {command}",
        "exit": status,
        "seconds": round(time.time() - start, 1),
        "tail": log.read_text(errors="replace")[-6000:],
    }


def save(out: Path, report: dict[str, Any], names: Iterable[str], archive: Path | None) -> None:
    """Write OUT/report.json, the page OUT/report.md (results, pictures, what has not run) and the archive."""
    lines = ["# GPU report", "", ", ".join(f"{key} {value}" for key, value in report["machine"].items()) + "."]
    for name in names:
        result = report["parts"].get(name)
        if result is None:
            lines += ["", f"## {name}: not run"]
            continue
        known = {0: "done", 124: "ran out of time", -9: "was killed, out of time or memory,"}
        state = known.get(result["exit"], f"failed, exit status {result['exit']},")
        lines += ["", f"## {name}: {state} in {result['seconds']:.0f} s", "", f"    {result['command']}", ""]
        lines += ["```", result["tail"].strip(), "```"]
        lines += [f"\n![{path.stem}]({path.relative_to(out)})" for path in sorted((out / name).glob("*.png"))]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    partial = out / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(out / "report.json")
    if archive:
        partial = archive.with_name(f"{archive.name}.partial")
        with tarfile.open(partial, "w:gz") as file:
            file.add(out, arcname=".", filter=lambda info: info if not info.name.endswith(LOCAL) else None)
        partial.replace(archive)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the number of parts that failed or were not reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100", help="name in let-composer plan's table (default: h100)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_report"))
    parser.add_argument("--archive", type=Path, help="read where there is no OUT yet; rewritten after every part")
    parser.add_argument("--only", nargs="+", help="names of parts")
    parser.add_argument("--minutes", type=float, default=60, help="all parts end within them (default: 60)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy size, into OUT-rehearsal")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.rehearse:
        parser.error("there is no CUDA device here. On a CPU, --rehearse runs every part at toy size.")
    out = args.out.absolute()
    out = out.with_name(f"{out.name}-rehearsal") if args.rehearse else out
    if args.archive and args.archive.exists() and not out.exists():
        with tarfile.open(args.archive) as archive:
            archive.extractall(out, filter="data")
    if args.rehearse:
        toy_data(out / "toy")
    memory = 0 if args.rehearse else torch.cuda.get_device_properties(0).total_memory / 2**30
    flash = importlib.util.find_spec("flash_attn") is not None and not args.rehearse
    plan = parts(out, args.gpu, flash, memory, args.rehearse)
    todo = args.only or list(plan)
    if unknown := set(todo) - set(plan):
        parser.error(f"no parts {', '.join(sorted(unknown))}. There are {', '.join(plan)}.")
    out.mkdir(parents=True, exist_ok=True)
    stored, about = out / "report.json", machine()
    report = json.loads(stored.read_text()) if stored.exists() else {"machine": {}}
    if not isinstance(report, dict) or report["machine"] | {"date": about["date"]} != about:
        report = {"machine": about, "parts": {}}
    results, end = report["parts"], time.time() + 60 * args.minutes
    for name in todo:
        left = end - time.time()
        if results.get(name, {}).get("exit") == 0:
            print(f"{name}: done before.", flush=True)
        elif left < 3 * GRACE:
            print(f"{name}: no time left. Call again to go on.", flush=True)
        else:
            seconds = left if args.rehearse or name == REST else min(LIMIT, left)
            print(f"{name}: at most {seconds:.0f} s ...", flush=True)
            results[name] = run(plan[name], out / f"{name}.log", seconds)
            print(f"{name}: exit status {results[name]['exit']}.", flush=True)
        save(out, report, plan, args.archive)
    print(out / "report.md")
    return sum(results.get(name, {}).get("exit") != 0 for name in todo)


if __name__ == "__main__":
    sys.exit(main())
