"""Names that nobody knows, and the nearest ones that somebody does; imports nothing that takes time."""

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["nearest", "refuse_unknown"]


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` with the nearest known name, or nothing where none is near."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def refuse_unknown(where: str, names: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse names that nobody reads.

    Raises:
        ValueError: With the nearest name that is known.
    """
    known = sorted(known)
    for name in map(str, names):
        if name not in known:
            listed = f" There are {', '.join(known)}." if len(known) < 40 else ""
            raise ValueError(f"{where} has no {name!r}{nearest(name, known)}.{listed}")
