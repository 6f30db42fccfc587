"""What every benchmark says about the machine and the code it ran on, how it times and writes."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["ROOT", "ceilings", "machine", "sources", "timed", "write"]

ROOT = Path(__file__).resolve().parents[2]


def sources() -> str:
    """Short hash of all code and YAMLs: names the version where there is no git."""
    found = hashlib.sha256()
    for folder in ("let_composer", "scripts", "tests", "yamls"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Device, versions, hash of the sources, date."""
    cuda = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.processor() or platform.machine()})"}
    found |= {"python": platform.python_version(), "cuda": str(torch.version.cuda) if cuda else "none"}  # pyright: ignore
    for package in ("torch", "triton", "numpy", "mosaicml", "llm-foundry", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found | {"sources": sources(), "date": datetime.date.today().isoformat()}


def timed(step: Callable[[], object], device: str, repeats: int = 100) -> list[float]:
    """Milliseconds of ``step()``: median, 20th and 80th percentile.

    Args:
        step: What is timed.
        device: On ``"cuda"`` the L2 cache is emptied before every call.
        repeats: For so many milliseconds; on the CPU so many calls. Default: 100.
    """
    step()
    quantiles = [0.5, 0.2, 0.8]
    if device == "cuda":
        import triton.testing

        return triton.testing.do_bench(step, rep=repeats, quantiles=quantiles)  # pyright: ignore[reportReturnType]
    return (1e3 * np.quantile(timeit.repeat(step, number=1, repeat=repeats), quantiles)).tolist()


def ceilings(device: str) -> dict[str, float]:
    """What this device reaches, to compare with: a large copy (bytes read and written) and a square matmul."""
    size, width, repeats = (2**30, 8192, 500) if device == "cuda" else (2**24, 256, 5)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, square = torch.empty_like(source), torch.randn(width, width, dtype=torch.bfloat16, device=device)
    return {
        "copy_gb_per_s": 2 * size / 1e6 / timed(lambda: target.copy_(source), device, repeats)[0],
        "bf16_matmul_tflop_per_s": 2 * width**3 / 1e9 / timed(lambda: square @ square, device, repeats)[0],
    }


def write(path: Path, content: Any) -> None:
    """Text, or what JSON takes; whole or not at all. (The report runs where this package is not installed.)"""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
