"""Late-to-Early Training (LET, arXiv 2602.05393) as a Composer algorithm.

``LET`` is loaded on first use, so that ``from let_composer import alignment_loss`` needs neither Composer, Triton nor a
GPU.
"""

from typing import TYPE_CHECKING, Any

from let_composer.loss import alignment_loss

if TYPE_CHECKING:
    from let_composer.algorithm import LET

__all__ = ["LET", "alignment_loss"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LET":
        from let_composer.algorithm import LET

        return LET
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
