"""The options of the methods, checked as soon as they are read."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from let_composer.annealing import Anneal, parse_stop
from let_composer.balance import sampled
from let_composer.loss import Implementation, Resize
from let_composer.statistics import Normalize
from let_composer.teacher import Placement

__all__ = ["LETOptions", "Options", "RKDOptions"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What every method takes; see :class:`let_composer.LET` for the meaning of each.

    Raises:
        TypeError: For a value of another type.
        ValueError: For a value out of range.
    """

    teacher: str
    weight: float | Literal["auto"]
    stop: str
    anneal: Anneal
    trust_remote_code: bool

    _unimportant: ClassVar[frozenset[str]] = frozenset({"trust_remote_code"})  # may differ in a resumed run

    def __post_init__(self) -> None:
        _require_type("teacher", self.teacher, str, "a hub id or a path")
        _require_type("weight", 0 if self.weight == "auto" else self.weight, (int, float), "a number or auto")
        _require_type("trust_remote_code", self.trust_remote_code, bool, "true or false")
        if self.weight != "auto" and not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be finite and not negative, got {self.weight}. The paper's value is 0.1.")
        parse_stop(self.stop)
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}.")

    @property
    def off(self) -> bool:
        """Whether the run is not to be guided."""
        return self.weight == 0

    def projected(self, length: int) -> int:
        """How many positions of a row go through the teacher's LM head; if none do, it is not loaded."""
        raise NotImplementedError

    def teacher_arguments(self) -> dict[str, Any]:
        """What the teacher is loaded with, besides its name and its head."""
        return {"layer": -1, "placement": "replicate", "trust_remote_code": self.trust_remote_code}

    def same_teacher(self, other: "Options") -> bool:
        """Whether one teacher can serve both."""
        return (self.teacher, self.teacher_arguments()) == (other.teacher, other.teacher_arguments())

    def differences(self, stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What a checkpoint was made with and this run is not, as ``{option: (theirs, ours)}``.

        The teacher is left out: its weights are compared instead.
        """
        ours = dataclasses.asdict(self)
        skipped = self._unimportant | {"teacher"}
        return {
            key: (stored[key], value)
            for key, value in ours.items()
            if key in stored and stored[key] != value and key not in skipped
        }


@dataclasses.dataclass(frozen=True)
class LETOptions(Options):
    """The options of :class:`let_composer.LET`."""

    student_layer: int | str
    teacher_layer: int
    resize: Resize
    normalize_teacher: Normalize
    placement: Placement
    implementation: Implementation

    _unimportant: ClassVar[frozenset[str]] = Options._unimportant | {"placement", "implementation"}

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_type("student_layer", self.student_layer, (int, str), "a number of blocks or a dotted path")
        _require_type("teacher_layer", self.teacher_layer, int, "a number of blocks")
        if self.student_layer == 0 or self.teacher_layer == 0:
            raise ValueError(
                "student_layer and teacher_layer count the blocks passed, from 1; 0 would be the embeddings, which see "
                "no context."
            )
        if self.weight == "auto" and self.teacher_layer != -1:
            raise ValueError(
                "weight: auto compares the teacher's predictions with the student's, so it needs the teacher's last "
                f"layer. Got teacher_layer {self.teacher_layer}: leave it out, or give a number as the weight."
            )

    def projected(self, length: int) -> int:
        """A sample, to know the teacher's lead, where the weight sets itself."""
        return len(range(length)[sampled(length)]) if self.weight == "auto" else 0

    def teacher_arguments(self) -> dict[str, Any]:
        """What the teacher is loaded with, besides its name and its head."""
        return {**super().teacher_arguments(), "layer": self.teacher_layer, "placement": self.placement}


@dataclasses.dataclass(frozen=True)
class RKDOptions(Options):
    """The options of :class:`let_composer.RKD` and :class:`let_composer.SALT`."""

    temperature: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_type("temperature", self.temperature, (int, float), "a number")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and greater than 0, got {self.temperature}.")
        if self.weight == "auto" and self.temperature != 1:
            raise ValueError(
                f"with weight: auto, the default, the temperature must be 1, got {self.temperature}. Leave it out, or "
                "give a number as the weight."
            )
        if self.weight != "auto" and self.weight > 1:
            raise ValueError(f"weight is the share of the distillation term, from 0 to 1, got {self.weight}.")

    def projected(self, length: int) -> int:
        """All of them."""
        return length


def _require_type(name: str, value: Any, types: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__}).")
