"""Time strings and shapes to weights."""

import pytest
from composer.core import Time, Timestamp

from let_composer.annealing import Schedule, parse_stop, resolve_stop


@pytest.mark.parametrize(
    ("anneal", "quarter", "half"), [("linear", 0.75, 0.5), ("cosine", 0.853553, 0.5), ("constant", 1, 1)]
)
def test_shapes_are_exact_at_their_ends_and_never_rise(anneal, quarter, half):
    schedule = Schedule("0.5dur", anneal)
    schedule.resolve(Time.from_timestring("2000ba"), None)
    weights = [schedule.weight(Timestamp(batch=step), 2.0) for step in range(1002)]
    assert weights[0] == 2.0 and weights[1000] == weights.pop() == 0.0
    assert (weights[250], weights[500]) == (pytest.approx(2 * quarter, abs=1e-5), pytest.approx(2 * half))
    assert all(a >= b for a, b in zip(weights, weights[1:], strict=False))
    assert min(weights[:-1]) > 0


@pytest.mark.parametrize(
    ("stop", "max_duration", "batches", "expected"),
    [
        ("0.3dur", "7ba", None, "2ba"),
        ("0.5dur", "2e9tok", None, "1000000000tok"),
        ("0.3dur", "2ep", 50, "30ba"),
        ("1dur", "10ba", None, "10ba"),
        ("1ep", "4ep", 25, "25ba"),
        ("1ep", "60ba", 25, "25ba"),
        ("2e9tok", "5000ba", None, "2000000000tok"),
        ("40ba", "2ep", 30, "40ba"),
        ("40ba", "2ep", None, "40ba"),
        ("40ba", "3600sec", None, "40ba"),
    ],
)
def test_resolve_stop(stop, max_duration, batches, expected):
    resolved = resolve_stop(parse_stop(stop), Time.from_timestring(max_duration), batches)
    assert resolved == Time.from_timestring(expected)


@pytest.mark.parametrize(
    ("stop", "max_duration", "message"),
    [
        (1500, "9ba", "Add a unit"),
        ("1500", "9ba", "such as '0.3dur'"),
        ("soon", "9ba", "such as '0.3dur'"),
        ("2h", "9ba", "wall clock"),
        ("3iter", "9ba", "wall clock or iteration"),
        ("0ba", "9ba", "greater than 0"),
        ("1.5dur", "9ba", "past the end of training"),
        ("0.1dur", "5ba", "never act"),
        ("1ep", "2ep", "has no length"),
        ("0.5dur", "1ep", "has no length"),
        ("0.5dur", "3600sec", "no fixed number of steps"),
    ],
)
def test_a_bad_stop_is_explained(stop, max_duration, message):
    with pytest.raises(ValueError, match=message):
        resolve_stop(parse_stop(stop), Time.from_timestring(max_duration), None)


@pytest.mark.parametrize(("stop", "max_duration", "batches"), [("11ba", "10ba", None), ("3ep", "2ep", 10)])
def test_a_stop_past_the_end_is_told(stop, max_duration, batches, caplog):
    resolve_stop(parse_stop(stop), Time.from_timestring(max_duration), batches)
    assert f"stop is {stop}, but max_duration is {max_duration}" in caplog.text
