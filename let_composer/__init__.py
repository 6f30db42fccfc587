"""Late-to-Early Training (LET, arXiv 2602.05393) as a Composer algorithm.

What is exported is loaded on first use: ``from let_composer import alignment_loss`` needs neither Composer, Triton nor
a GPU, and the ``let-composer`` command starts at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from let_composer.distillation import RKD, SALT
    from let_composer.let import LET
    from let_composer.loss import alignment_loss

__all__ = ["LET", "RKD", "SALT", "alignment_loss"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LET":
        from let_composer.let import LET

        return LET
    if name == "alignment_loss":
        from let_composer.loss import alignment_loss

        return alignment_loss
    if name in ("RKD", "SALT"):
        from let_composer import distillation

        return getattr(distillation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
