"""Ranks that agree: what fails on one fails on all, and all have the same teacher."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from composer.utils import dist

__all__ = ["check_same", "everywhere"]

T = TypeVar("T")


def everywhere(name: str, action: Callable[[], T]) -> T:
    """Do it, and raise on every rank what was raised on one: else the others would wait for it in a collective.

    Args:
        name: The teacher, for the message.
        action: What every rank is to do.

    Raises:
        ValueError: On a rank that went well, naming those that did not; these raise their own error.
    """
    try:
        result, error = action(), None
    except Exception as caught:
        result, error = None, caught
    said = dist.all_gather_object(None if error is None else str(error))
    if error is not None:
        raise error
    failed = [rank for rank, message in enumerate(said) if message is not None]
    if failed:
        raise ValueError(f"teacher {name!r} failed on {_ranks(failed)}: {said[failed[0]]}")
    return result  # pyright: ignore[reportReturnType]


def check_same(name: str, fingerprints: Sequence[str]) -> None:
    """Raise a ValueError if the teacher ``name`` has not the same fingerprint on every rank; it names them."""
    ranks: dict[str, list[int]] = {}
    for rank, mark in enumerate(fingerprints):
        ranks.setdefault(mark, []).append(rank)
    if len(ranks) > 1:
        found = "; ".join(f"{_ranks(numbers)} {mark}" for mark, numbers in ranks.items())
        raise ValueError(
            f"expected the same teacher on every rank, but the weights of {name!r} differ between them ({found}). Give "
            "every node the same files: compare the folders or caches, or name a revision, as in name@revision."
        )


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}" + ", ..." * (len(numbers) > 8)
