"""From text to shards: sources → reading → tokens → shards, driven by convert; training imports manifest alone."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["PARTIAL", "DataError", "replacing", "write_json"]

PARTIAL = ".partial"


class DataError(ValueError):
    """Something about the input, the output folder or the arguments that the user can put right."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path``; the file or folder written there becomes ``path``, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if path.is_dir():
        shutil.rmtree(path)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")
