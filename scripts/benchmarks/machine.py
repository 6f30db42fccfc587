"""What every benchmark says about the machine and the code it ran on, and how it writes."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "machine", "sources", "write"]

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


def write(path: Path, content: Any) -> None:
    """Text, or what JSON takes; whole or not at all."""
    part = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    os.replace(part, path)
