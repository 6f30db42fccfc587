"""Every GPU measurement of the project behind one command: tests, kernels, steps, runs. Goes on where it was cut off.

    python scripts/gpu_report.py --gpu h200 [--out runs/gpu_report] [--only tests steps-1b4] [--minutes 25]

Each part is a program of its own with a time limit, and ends with the minutes; what it leaves in OUT is kept, and a
part that has succeeded at this commit on this device is not run again. OUT/report.json and OUT/report.md are written
after every part. The training needs the data that yamls/evidence_125m.yaml tells how to make.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Part", "main", "parts", "run", "write_report"]

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data" / "evidence" / "shards" / "manifest.json"  # of yamls/evidence_125m.yaml
# Without flash-attn, as on machines that offer nothing but the stack's pure Python parts.
PLAIN = ["variables.attention=torch", "variables.loss_fn=torch_crossentropy"]


@dataclass
class Part:
    """One measurement: a command, and how long it may take in seconds."""

    name: str
    command: list[str]
    limit: int


def parts(out: Path, gpu: str, has_flash: bool, memory_gib: float) -> list[Part]:
    """What is to be run, most wanted first.

    Args:
        out: Where results go.
        gpu: Name for benchmark_step.py.
        has_flash: Whether flash-attn can be used; without it attention keeps ``[S, S]`` matrices, so batches are small.
        memory_gib: Of the device.
    """

    def steps(size: str, batch: int) -> Part:
        command = ["scripts/benchmark_step.py", f"yamls/let_{size}.yaml", *([] if has_flash else PLAIN)]
        command += [f"global_train_batch_size={batch}", f"device_train_microbatch_size={batch}", "--gpu", gpu]
        return Part(f"steps-{size}", [*command, "--out", str(out / f"steps-{size}")], 300)

    found = [
        Part("ceilings", ["scripts/gpu_report.py", "--ceilings", "--out", str(out)], 120),
        Part("tests", ["-m", "pytest", "-m", "gpu", "-q", f"--junitxml={out / 'tests.xml'}"], 480),
        steps("1b4", 8 if has_flash else 2),
        Part("loss", ["scripts/benchmark_loss.py", "--out", str(out / "loss")], 420),
        steps("125m", 16),
        steps("350m", 8),
    ]
    if memory_gib > 100:  # weights and gradients in fp32, weights in bf16: 65 GiB before activations
        found.append(steps("7b", 2 if has_flash else 1))
    if not DATA.exists():
        return found
    # Last, because it fills whatever time is left: what has finished counts, the next call goes on with the others.
    sweep = ["scripts/sweep.py", "yamls/evidence_125m.yaml", "--workers", "1", "--runs", str(out / "evidence-125m")]
    found.append(Part("evidence-125m", [*sweep, *(["variables.attention=flash"] if has_flash else [])], 3600))
    return found


def run(part: Part, out: Path, environment: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run one part and keep its output.

    Args:
        part: What to run.
        out: Where ``<part>.log`` goes.
        environment: Stored with the result, so that it counts for this commit and device alone.
        seconds: How long it may take, its own limit aside.
    """
    start = time.time()
    with open(out / f"{part.name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(min(part.limit, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started: it would hold the device's memory
            process.wait()
            code = -1
    result = {
        "part": part.name,
        "command": " ".join(["python", *part.command]),
        "exit": code,
        "seconds": round(time.time() - start, 1),
        "environment": environment,
        "tail": (out / f"{part.name}.log").read_text(errors="replace")[-3000:],
    }
    _write(out / f"{part.name}.result.json", json.dumps(result, indent=2))
    return result


def write_report(out: Path, results: list[dict[str, Any]]) -> None:
    """Write OUT/report.json and OUT/report.md from the results so far."""
    _write(out / "report.json", json.dumps(results, indent=2) + "\n")
    lines = ["# GPU report", ""]
    if results:
        lines += [", ".join(f"{key} {value}" for key, value in results[0]["environment"].items()) + ".", ""]
    for result in results:
        state = {0: "done", -1: "ran out of time"}.get(result["exit"], f"failed, exit status {result['exit']}")
        lines += [f"## {result['part']}: {state} in {result['seconds']:.0f} s", "", f"    {result['command']}", ""]
        lines += ["```", result["tail"].strip(), "```", ""]
    _write(out / "report.md", "\n".join(lines))


def main(arguments: list[str] | None = None, plan: Callable[..., list[Part]] = parts) -> int:
    """Command line of the module's docstring; the number of parts that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100", help="name in let-composer plan's table (default: h100)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_report"))
    parser.add_argument("--only", nargs="+", help="names of parts")
    parser.add_argument("--minutes", type=float, default=25, help="start no part after this (default: 25)")
    parser.add_argument(
        "--ceilings", action="store_true", help="measure copy bandwidth and matmul rate, and nothing else"
    )
    args = parser.parse_args(arguments)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.ceilings:
        ceilings = _ceilings()
        print(json.dumps(ceilings, indent=2))
        _write(args.out / "ceilings.json", json.dumps(ceilings, indent=2) + "\n")
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here. On a CPU run bash scripts/test.sh and scripts/benchmark_step.py.")
    environment = _environment()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    todo = plan(args.out, args.gpu, _has_flash(), memory)
    if not DATA.exists():
        print(f"no training: there is no {DATA}. The first lines of yamls/evidence_125m.yaml say how to make it.")
    if args.only:
        if unknown := set(args.only) - {part.name for part in todo}:
            parser.error(f"no parts {', '.join(sorted(unknown))}. There are {', '.join(part.name for part in todo)}.")
        todo = [part for part in todo if part.name in args.only]
    end, results, failed = time.time() + 60 * args.minutes, [], 0
    for part in todo:
        stored = args.out / f"{part.name}.result.json"
        result = json.loads(stored.read_text()) if stored.exists() else {}
        if result.get("exit") == 0 and result["environment"] == environment:
            print(f"{part.name}: done before.", flush=True)
        elif time.time() < end:
            print(f"{part.name}: at most {part.limit} s ...", flush=True)
            result = run(part, args.out, environment, end - time.time())
            print(f"{part.name}: exit status {result['exit']} after {result['seconds']:.0f} s.", flush=True)
        else:
            print(f"{part.name}: no time left. Call again to go on.", flush=True)
            failed += 1
            continue
        failed += result["exit"] != 0
        results.append(result)
        write_report(args.out, results)
    print(args.out / "report.md")
    return failed


def _ceilings() -> dict[str, float]:
    """What this card reaches, to compare with: a large copy (bytes read and written) and a bf16 matmul of 8192^3."""

    from torch.utils.benchmark import Timer

    def seconds(statement: str, **values: torch.Tensor) -> float:
        return Timer(statement, globals=values).blocked_autorange(min_run_time=2).median

    source = torch.ones(2**30, dtype=torch.int32, device="cuda")
    copy = seconds("target.copy_(source)", source=source, target=torch.empty_like(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {
        "copy_tb_per_s": 2 * source.numel() * source.element_size() / copy / 1e12,
        "matmul_tflop_per_s": 2 * 8192**3 / seconds("a @ b", a=a, b=b) / 1e12,
    }


def _environment() -> dict[str, Any]:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git("describe", "--always", "--dirty") or "unknown",
    }


def _has_flash() -> bool:
    try:
        import flash_attn  # pyright: ignore[reportMissingImports] # noqa: F401
    except ImportError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".tmp")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
