"""Options are refused as soon as they are read."""

import dataclasses
from typing import Any

import pytest

from let_composer import LET, SALT


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (LET, {"wieght": 0.1}, ValueError, "LET has no 'wieght' .did you mean 'weight'"),
        (LET, {"lambda": 0.1}, ValueError, "LET has no 'lambda'"),
        (LET, {"weight": -0.1}, ValueError, "weight must be finite and not negative, got -0.1"),
        (LET, {"weight": float("nan")}, ValueError, "got nan"),
        (LET, {"weight": "0.1"}, TypeError, "weight must be a number or auto, got '0.1' .str"),
        (LET, {"weight": True}, TypeError, "weight must be a number or auto, got True"),
        (LET, {"teacher": 3}, TypeError, "teacher must be a hub id or a path"),
        (LET, {"student_layer": 0}, ValueError, "count the blocks passed, from 1"),
        (LET, {"student_layer": 2.5}, TypeError, "student_layer must be a number of blocks or a dotted path"),
        (LET, {"teacher_layer": "last"}, TypeError, "teacher_layer must be a number of blocks"),
        (LET, {"stop": "soon"}, ValueError, "stop must be a time string"),
        (LET, {"anneal": "step"}, ValueError, "anneal must be one of linear, cosine, constant, got 'step'"),
        (LET, {"resize": "both"}, ValueError, "resize must be one of teacher, student"),
        (LET, {"normalize_teacher": True}, ValueError, "normalize_teacher must be one of none, center, standardize"),
        (LET, {"placement": "cpu"}, ValueError, "placement must be one of replicate, shard"),
        (LET, {"teacher_layer": 1}, ValueError, "needs the teacher's last layer. Got teacher_layer 1"),
        (LET, {"implementation": "cuda"}, ValueError, "implementation must be one of auto, triton, torch"),
        (LET, {"trust_remote_code": "no"}, TypeError, "trust_remote_code must be true or false"),
        (SALT, {"weight": 1.5}, ValueError, "share of the distillation term, from 0 to 1, got 1.5"),
        (SALT, {"temperature": 0}, ValueError, "temperature must be finite and greater than 0, got 0"),
        (SALT, {"weight": "auto", "temperature": 2.0}, ValueError, "the temperature must be 1, got 2.0"),
        (SALT, {"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        (SALT, {"resize": "student"}, ValueError, "SALT has no 'resize'. There are anneal, stop, teacher"),
    ],
)
def test_bad_options(method, options, error, message):
    with pytest.raises(error, match=message):
        method(**options)


def test_options_are_fixed_and_a_subclass_has_its_own():
    method = LET()
    with pytest.raises(dataclasses.FrozenInstanceError, match="weight is fixed once LET is made"):
        method.weight = 0

    class Own(LET):
        def __init__(self, scale: float, **options: Any) -> None:
            super().__init__(**options)
            self.scale = scale

    assert (Own(2.0, weight=0.5).weight, Own(2.0).scale) == (0.5, 2.0)
    with pytest.raises(TypeError, match="wieght"):
        Own(2.0, wieght=0.5)
