"""Late-to-Early Training (LET, arXiv 2602.05393) as a Composer algorithm.

What is exported is loaded on first use: ``from let_composer import alignment_loss`` needs neither Composer, Triton nor
a GPU, and the ``let-composer`` command starts at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from let_composer.distillation import RKD, SALT
    from let_composer.let import LET
    from let_composer.loss import alignment_loss

__all__ = ["LET", "RKD", "SALT", "alignment_loss"]
__version__ = "0.1.0"


_ROOMS = {"LET": "let", "RKD": "distillation", "SALT": "distillation", "alignment_loss": "loss"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"let_composer.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
