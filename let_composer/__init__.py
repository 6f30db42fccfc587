"""Late-to-Early Training (LET, arXiv 2602.05393) as a Composer algorithm.

``LET`` and what it is compared with, ``RKD`` and ``SALT``, are loaded on first use, so that ``from let_composer import
alignment_loss`` needs neither Composer, Triton nor a GPU.
"""

from typing import TYPE_CHECKING, Any

from let_composer.loss import alignment_loss

if TYPE_CHECKING:
    from let_composer.distillation import RKD, SALT
    from let_composer.let import LET

__all__ = ["LET", "RKD", "SALT", "alignment_loss"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LET":
        from let_composer.let import LET

        return LET
    if name in ("RKD", "SALT"):
        from let_composer import distillation

        return getattr(distillation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
