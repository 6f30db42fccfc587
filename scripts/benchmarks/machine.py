"""What every benchmark says about the machine and the code it ran on."""

import datetime
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["ROOT", "machine"]

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, str]:
    """Device, versions, date, and a short hash of all code and YAMLs: it names the sources where there is no git."""
    sources = hashlib.sha256()
    for folder in ("let_composer", "scripts", "tests", "yamls"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml")):
            sources.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its CUDA
        **{name: version(name) for name in ("triton", "numpy", "mosaicml", "llm-foundry", "transformers")},
        "sources": sources.hexdigest()[:12],
        "date": datetime.date.today().isoformat(),
    }
