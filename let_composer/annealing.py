"""From time strings and a shape to the weight of the guidance."""

import logging
import math
from typing import Literal

from composer.core import Time, Timestamp, TimeUnit

__all__ = ["Anneal", "Schedule", "parse_stop", "resolve_stop"]

log = logging.getLogger(__name__)

Anneal = Literal["linear", "cosine", "constant"]

_UNITS = (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE, TimeUnit.EPOCH, TimeUnit.DURATION)


def parse_stop(stop: str) -> Time:
    """Parse the end of the guidance.

    Raises:
        ValueError: If it is no Composer time string in ``ba``, ``tok``, ``sp``, ``ep`` or ``dur``, greater than 0;
            ``dur`` at most 1.
    """
    expected = "stop must be a time string such as '0.3dur', '1500ba', '2e9tok', '1e6sp' or '1ep'"
    if not isinstance(stop, str):
        raise ValueError(f"{expected}, got {stop!r}. Add a unit.")
    try:
        time = Time.from_timestring(stop)
    except ValueError as error:
        raise ValueError(f"{expected}, got {stop!r}.") from error
    if time.unit not in _UNITS:
        raise ValueError(f"{expected}, got {stop!r}: the guidance cannot end by wall clock or iteration.")
    if not time.value > 0:
        raise ValueError(f"{expected} greater than 0, got {stop!r}. To train without guidance, set weight: 0.")
    if time.unit == TimeUnit.DURATION and time.value > 1:
        raise ValueError(f"stop lies past the end of training: expected at most '1dur', got {stop!r}.")
    return time


def resolve_stop(stop: Time, max_duration: Time, dataloader_len: int | None) -> Time:
    """Turn what :func:`parse_stop` returned into batches, tokens or samples of this run.

    ``dur`` is a fraction of ``max_duration`` and epochs become batches, both truncated to whole units, as Composer's
    learning-rate schedulers do. Warns when the result lies past the end of training, which may be one part of a run.

    Raises:
        ValueError: If epochs cannot be converted, or the result is empty.
    """
    if stop.unit == TimeUnit.DURATION:
        end = _in_steps(max_duration, dataloader_len, "max_duration")
        resolved = Time(int(end.value * stop.value), end.unit)
    else:
        resolved = _in_steps(stop, dataloader_len, "stop")
        try:
            end = _in_steps(max_duration, dataloader_len, "max_duration")
        except ValueError:  # then there is nothing to compare with
            end = max_duration
    if resolved.value < 1:
        raise ValueError(
            f"stop {stop.to_timestring()} of max_duration {max_duration.to_timestring()} is less than one "
            f"{resolved.unit.value}, so the guidance would never act. Raise stop, or remove LET."
        )
    if resolved.unit == end.unit and resolved.value > end.value:
        log.warning(
            f"stop is {stop.to_timestring()}, but max_duration is {max_duration.to_timestring()}: the guidance will "
            "not end within this part of the run. For a fraction of it, write stop as in '0.3dur'."
        )
    return resolved


class Schedule:
    """How much the guidance weighs at any time of a run.

    The end is found once, from the length that the run has then. It outlives resumes and longer runs, until the clock
    goes back.

    Args:
        stop: As for :func:`parse_stop`.
        anneal: ``"linear"`` (paper), ``"cosine"`` (half a period), or ``"constant"`` until the end.
    """

    def __init__(self, stop: str, anneal: Anneal) -> None:
        self.stop = parse_stop(stop)
        self.anneal: Anneal = anneal
        self.end: Time | None = None  # in ba, tok or sp
        self.batch = 0  # how far the clock has come

    def notice(self, batch: int) -> bool:
        """Whether the clock has gone back since it was looked at; the end is then to be found anew."""
        back = batch < self.batch
        self.batch = batch
        if back:
            self.end = None
        return back

    def resolve(self, max_duration: Time, dataloader_len: int | None) -> None:
        """Find the end, unless it is known; see :func:`resolve_stop`."""
        self.end = self.end or resolve_stop(self.stop, max_duration, dataloader_len)

    def weight(self, clock: Timestamp, start: float) -> float:
        """The weight now: exactly ``start`` at 0, exactly 0 from the end on."""
        assert self.end is not None
        left = max(0.0, 1.0 - clock.get(self.end.unit).value / self.end.value)
        if left == 0.0:
            return 0.0
        if self.anneal == "linear":
            return start * left
        if self.anneal == "cosine":
            return start * 0.5 * (1.0 - math.cos(math.pi * left))
        return start

    def over(self, clock: Timestamp) -> bool:
        """Whether the end is known and has passed."""
        return self.end is not None and self.weight(clock, 1.0) == 0

    def __str__(self) -> str:
        return (self.end or self.stop).to_timestring()


def _in_steps(time: Time, dataloader_len: int | None, name: str) -> Time:
    if time.unit == TimeUnit.EPOCH:
        if dataloader_len is None:
            raise ValueError(
                f"{name} is {time.to_timestring()}, but the training data loader has no length, so epochs cannot be "
                "turned into batches. Give stop in 'ba', 'tok' or 'sp'."
            )
        return Time(time.value * dataloader_len, TimeUnit.BATCH)
    if time.unit in (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE):
        return time
    raise ValueError(
        f"{name} is {time.to_timestring()}, which has no fixed number of steps. Give stop in 'ba', 'tok' or 'sp'."
    )
