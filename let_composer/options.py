"""The options of the methods, checked as soon as they are read."""

import dataclasses
import inspect
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from let_composer.annealing import Anneal, parse_stop
from let_composer.names import refuse_unknown
from let_composer.teacher import Placement

__all__ = ["Options", "require_type"]


class Options:
    """What every method takes; see :class:`let_composer.LET` for the meaning of each. A method is a dataclass, whose
    fields are these and its own.

    Raises:
        TypeError: For a value of another type.
        ValueError: For an unknown option or a value out of range.
    """

    teacher: str
    weight: float | Literal["auto"]
    stop: str
    anneal: Anneal
    trust_remote_code: bool
    # Of these LET makes options of its own; the others have them as they are here.
    teacher_layer: int = -1
    placement: Placement = "replicate"

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __new__(cls, *_: Any, **given: Any):  # before the dataclass looks, whose message would not say what there is
        parameters = inspect.signature(cls.__init__).parameters
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            refuse_unknown(cls.__name__, given, [name for name in parameters if name != "self"])
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dataclass_fields__ and name in self.__dict__:
            raise dataclasses.FrozenInstanceError(f"{name} is fixed once {type(self).__name__} is made: make another.")
        super().__setattr__(name, value)

    def check(self) -> None:
        """Refuse values of another type or out of range."""
        require_type("teacher", self.teacher, str, "a hub id or a path")
        require_type("weight", 0 if self.weight == "auto" else self.weight, (int, float), "a number or auto")
        require_type("trust_remote_code", self.trust_remote_code, bool, "true or false")
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
        return {"layer": self.teacher_layer, "placement": self.placement, "trust_remote_code": self.trust_remote_code}

    def same_teacher(self, other: "Options") -> bool:
        """Whether one teacher can serve both."""
        return (self.teacher, self.teacher_arguments()) == (other.teacher, other.teacher_arguments())


def require_type(name: str, value: Any, types: type | tuple[type, ...], expected: str) -> None:
    """Refuse a value of another type; true and false are no numbers.

    Raises:
        TypeError: If it is one.
    """
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__}).")
