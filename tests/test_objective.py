"""Losses of every form."""

from typing import NamedTuple

import pytest
import torch

from let_composer.objective import logits_of, plus, total


class Named(NamedTuple):
    loss: torch.Tensor
    balance: torch.Tensor


@pytest.mark.parametrize(
    "loss",
    [
        torch.tensor(2.0),
        torch.tensor([2.0]),
        (torch.tensor(1.5), torch.tensor(0.5)),
        [torch.tensor(2.0)],
        {"total": torch.tensor(2.0), "loss": torch.tensor(1.9), "lbl": torch.tensor(0.1)},
        {"loss": torch.tensor(1.9), "lbl": torch.tensor(0.1)},
        Named(torch.tensor(1.5), torch.tensor(0.5)),
    ],
)
def test_the_loss_keeps_its_type(loss):
    result = plus(loss, torch.tensor(0.5))
    assert type(result) is type(loss)
    assert float(total(loss)) == pytest.approx(2.0)
    assert float(total(result)) == pytest.approx(2.5)
    if isinstance(loss, dict):
        assert {**loss, "total": result["total"]} == result


def test_logits_are_found_in_tuples_and_refused_where_there_are_none():
    logits = torch.zeros(2, 3, 5)
    assert logits_of((torch.tensor(1.0), logits)) is logits
    assert logits_of({"logits": logits}) is logits
    with pytest.raises(ValueError, match="but got tuple without them"):
        logits_of((torch.tensor(1.0),))
