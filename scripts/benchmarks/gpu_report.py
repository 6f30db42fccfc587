"""Every GPU measurement of the project behind one command: tests, kernels, steps, runs. One page comes out.

    python scripts/benchmarks/gpu_report.py --gpu h100 --minutes 9 --archive runs/gpu_report.tar.gz [--only tests loss]
    python scripts/benchmarks/gpu_report.py --rehearse      # the whole chain at toy size on a CPU, in a few minutes

Each part is a program of its own with a time limit. What it leaves in OUT is kept, and a part that has succeeded with
these sources on this device is not run again. The loss benchmark and the evidence go on where they were cut off. After
every part OUT/report.md, OUT/report.json and the archive are rewritten; carry the archive to the next machine, and the
same command goes on there. The evidence needs the data that yamls/evidence/evidence_125m.yaml tells how to make.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, machine, write

__all__ = ["Part", "main", "parts", "run", "write_report"]

FOLDER = "scripts/benchmarks"
EVIDENCE = "yamls/evidence/evidence_125m.yaml"
DATA = Path("data/evidence/shards")  # of that YAML
SLOWER = 3  # times as long may a rehearsal take: compilers have no GPU to wait for, and perhaps few cores
GRACE = 20  # seconds between asking a part to end and ending it
# Without flash-attn, as on machines that offer nothing but the stack's pure Python parts.
PLAIN = ["variables.attention=torch", "variables.loss_fn=torch_crossentropy"]
SMALL = "model.d_model=64 model.n_heads=2 model.n_layers=4 model.ffn_config.ffn_hidden_size=128 precision=fp32"
TOY = f"{SMALL} max_seq_len=32 algorithms.let.teacher=EleutherAI/pythia-14m global_train_batch_size=2"


@dataclass
class Part:
    """One measurement: a command, how long it may take in seconds, what a rehearsal adds."""

    name: str
    command: list[str]
    limit: int
    toy: str = ""


def parts(out: Path, gpu: str, has_flash: bool, memory_gib: float, rehearse: bool = False) -> list[Part]:
    """What is to be run, most wanted first. Without flash-attn attention keeps ``[S, S]`` matrices, so batches are
    small; a rehearsal makes its own data."""

    def tests(name: str, file: str, limit: int) -> Part:
        many = ["-n", "8"] if importlib.util.find_spec("xdist") and not rehearse else []
        command = ["-m", "pytest", "-m", "gpu", file, "-q", "-W", "ignore", "-p", "no:cacheprovider", *many]
        return Part(name, [*command, f"--junitxml={out / name}.xml"], limit)

    def loss(name: str, *options: str) -> Part:
        toy = "--device cpu --implementation torch --pairs 48/24 --tokens 8 --repeats 2"
        command = [f"{FOLDER}/loss.py", "--out", str(out / name), *options]
        return Part(name, command, 420, toy)

    def step(size: str, batch: int, micro: Any, name: str = "") -> Part:
        name = name or f"step-{size}"
        command = [f"{FOLDER}/step.py", f"yamls/let_{size}.yaml", *([] if has_flash else PLAIN)]
        command += [f"global_train_batch_size={batch}", f"device_train_microbatch_size={micro}", "--gpu", gpu]
        toy = f"{TOY} device_train_microbatch_size=1 --rounds 2 --steps 3"
        return Part(name, [*command, "--out", str(out / name)], 300, toy)

    small = 8 if has_flash else 2
    found = [
        tests("kernel-tests", "tests/test_kernels.py", 240),
        loss("loss"),
        step("1b4", 2 * small, small),
        tests("trainer-tests", "tests/test_gpu.py", 300),
        loss("loss-teacher", "--resize", "teacher"),
        step("125m", 32, 16),
        step("1b4", 4 * small, "auto", name="step-1b4-auto"),
        loss("loss-normalized", "--normalize", "--pairs", "2048/768", "4096/2048"),
        loss("loss-fp32", "--dtype", "float32", "--pairs", "2048/768", "4096/2048"),
    ]
    if memory_gib > 100 or rehearse:  # weights and gradients in fp32, weights in bf16: 65 GiB before activations
        found.append(step("7b", 4 if has_flash else 2, 2 if has_flash else 1))
    command = ["scripts/evidence/sweep.py", EVIDENCE, "--workers", "1", "--runs", str(out / "evidence-125m")]
    command += ["variables.attention=flash"] if has_flash else []
    toy = f"{SMALL} model.vocab_size=512 max_seq_len=64 max_duration=4ba eval_interval=2ba eval_subset_num_batches=1"
    toy += " global_train_batch_size=2 device_train_microbatch_size=1 device_eval_batch_size=1"
    for loader in ("train_loader", "eval_loader"):
        toy += f" {loader}.dataset.local={out}/toy/shards {loader}.num_workers=1"
    toy += f" variables.tokenizer={out}/toy/teacher variables.pretrained={out}/toy/teacher --only baseline pretrained"
    if rehearse:
        found.append(Part("toy-data", [f"{FOLDER}/toy_data.py", str(out / "toy")], 120))
    if rehearse or (ROOT / DATA).exists():  # last: it fills whatever time is left
        found.append(Part("evidence-125m", command, 3600, toy))
    return found


def run(part: Part, out: Path, environment: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run one part, for so many seconds at most and within its own limit, and keep its output in ``OUT/<part>.log``.
    The environment is stored with the result, which counts for these sources and this device alone."""
    start, log = time.time(), out / f"{part.name}.log"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    variables["GIT_PYTHON_REFRESH"] = "quiet"  # llm-foundry imports GitPython, which raises where there is no git
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code = None
        for number, wait in ((signal.SIGINT, min(part.limit, seconds) - GRACE), (signal.SIGKILL, GRACE)):
            try:
                code = process.wait(max(wait, 1))
                break
            except subprocess.TimeoutExpired:  # with what it started: it would hold the device's memory
                os.killpg(process.pid, number)
        process.wait()
    timed_out = code is None or code in (-signal.SIGINT, 128 + signal.SIGINT)
    result = {
        "part": part.name,
        "command": " ".join(["python", *part.command]),
        "exit": -1 if timed_out else code,
        "seconds": round(time.time() - start, 1),
        "environment": environment,
        "tail": log.read_text(errors="replace")[-6000:],
    }
    write(out / f"{part.name}.result.json", result)
    return result


def write_report(out: Path, results: list[dict[str, Any]], missing: list[str]) -> None:
    """Write OUT/report.json and the page, OUT/report.md: results, pictures, what was not reached."""
    write(out / "report.json", results)
    lines = ["# GPU report", "", ", ".join(f"{k} {v}" for k, v in results[0]["environment"].items()) + "."]
    for result in results:
        state = {0: "done", -1: "ran out of time"}.get(result["exit"], f"failed, exit status {result['exit']}")
        lines += ["", f"## {result['part']}: {state} in {result['seconds']:.0f} s", "", f"    {result['command']}", ""]
        lines += ["```", result["tail"].strip(), "```"]
        lines += [f"\n![{p.stem}]({p.relative_to(out)})" for p in sorted((out / result["part"]).glob("*.png"))]
    if missing:
        lines += ["", "## Not reached", "", *(f"- {name}" for name in missing)]
    write(out / "report.md", "\n".join(lines) + "\n")


def main(arguments: list[str] | None = None, plan: Callable[..., list[Part]] = parts) -> int:
    """Command line; the number of parts that failed or were not reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100", help="name in let-composer plan's table (default: h100)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_report"))
    parser.add_argument(
        "--archive", type=Path, help="results to go on with, where OUT has none; rewritten after every part"
    )
    parser.add_argument("--only", nargs="+", help="names of parts")
    parser.add_argument("--minutes", type=float, default=25, help="all parts end within them (default: 25)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy size, into OUT-rehearsal")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.rehearse:
        parser.error("there is no CUDA device here. On a CPU, --rehearse runs every part at toy size.")
    out = args.out.absolute()
    out = out.with_name(f"{out.name}-rehearsal") if args.rehearse else out
    out.mkdir(parents=True, exist_ok=True)
    if args.archive and args.archive.exists():
        with tarfile.open(args.archive) as archive:
            missing_here = [member for member in archive if not (out / member.name).exists()]
            archive.extractall(out, missing_here, filter="data")
    memory = 0 if args.rehearse else torch.cuda.get_device_properties(0).total_memory / 2**30
    has_flash = importlib.util.find_spec("flash_attn") is not None and not args.rehearse
    todo = plan(out, args.gpu, has_flash, memory, args.rehearse)
    if args.only:
        if unknown := set(args.only) - {part.name for part in todo}:
            parser.error(f"no parts {', '.join(sorted(unknown))}. There are {', '.join(part.name for part in todo)}.")
        todo = [part for part in todo if part.name in args.only]
    environment = {key: value for key, value in machine().items() if key != "date"}
    minutes = args.minutes * (SLOWER if args.rehearse else 1)
    end, results, missing = time.time() + 60 * minutes, [], []
    for part in todo:
        if args.rehearse:
            part.command += shlex.split(part.toy)
            part.limit *= SLOWER
        stored = out / f"{part.name}.result.json"
        result = json.loads(stored.read_text()) if stored.exists() else {}
        left = end - time.time()
        if result.get("exit") == 0 and result["environment"] == environment:
            print(f"{part.name}: done before.", flush=True)
        elif left < 3 * GRACE:
            print(f"{part.name}: no time left. Call again to go on.", flush=True)
            missing.append(part.name)
            continue
        else:
            print(f"{part.name}: at most {min(part.limit, left):.0f} s ...", flush=True)
            result = run(part, out, environment, left)
            print(f"{part.name}: exit status {result['exit']} after {result['seconds']:.0f} s.", flush=True)
        results.append(result)
        write_report(out, results, missing)
        if args.archive:
            partial = args.archive.with_name(f"{args.archive.name}.partial")
            with tarfile.open(partial, "w:gz") as archive:
                archive.add(out, arcname=".", filter=lambda info: None if "huggingface" in info.name else info)
            partial.replace(args.archive)
    print(out / "report.md")
    return len(missing) + sum(result["exit"] != 0 for result in results)


if __name__ == "__main__":
    sys.exit(main())
