"""Running statistics of the teacher's features."""

from typing import Any

import pytest
import torch

from let_composer.statistics import FeatureStatistics

CPU = torch.device("cpu")


def fed(
    kind: Any, rows: torch.Tensor, batches: list[int], microbatch: int = 10**9, mask: Any = None
) -> FeatureStatistics:
    statistics = FeatureStatistics(kind)
    mask = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask
    for batch, counts in zip(rows.split(batches), mask.split(batches), strict=True):
        parts = zip(batch.split(microbatch), counts.split(microbatch), strict=True)
        statistics.update(torch.stack([statistics.sums(*part) for part in parts]).sum(dim=0))
    return statistics


@pytest.mark.parametrize("microbatch", [10**9, 7])
def test_equal_to_the_statistics_of_all_rows_that_count(microbatch):
    torch.manual_seed(0)
    rows = torch.randn(9999, 12) * torch.logspace(-3, 3, 12) + 1000  # means far larger than some deviations
    mask = torch.rand(9999) > 0.4
    rows[1, 3], rows[500, 3], mask[:501] = torch.nan, torch.inf, True
    truth = rows[mask & torch.isfinite(rows).all(dim=-1)].double()
    wanted = truth.std(dim=0, correction=0)
    wanted = wanted.clamp(min=float(wanted.mean()) * 1e-3)
    batches = [1, 99, 5000, 4899]  # one with more rows than are converted at a time
    for kind in ("center", "standardize"):
        mean, std = fed(kind, rows, batches, microbatch, mask).mean_and_std(CPU)
        torch.testing.assert_close(mean.double(), truth.mean(dim=0), rtol=1e-6, atol=0)
        if kind == "standardize":
            torch.testing.assert_close(std.double(), wanted, rtol=1e-3, atol=0)
        else:
            assert std is None


def test_batches_without_tokens_change_nothing():
    rows, none = torch.randn(5, 3), torch.zeros(5, dtype=torch.bool)
    statistics = FeatureStatistics("standardize")
    assert statistics.mean_and_std(CPU) == (None, None)
    statistics.update(statistics.sums(rows, none))
    torch.testing.assert_close(statistics.mean_and_std(CPU), (torch.zeros(3), torch.ones(3)))
    statistics.update(statistics.sums(rows, ~none))
    before = statistics.mean_and_std(CPU)
    statistics.update(statistics.sums(rows, none))
    torch.testing.assert_close(statistics.mean_and_std(CPU), before, rtol=0, atol=0)


def test_they_go_where_the_features_are():
    """Also anew, as after a reset of the clock in the middle of a guidance."""
    statistics = fed("standardize", torch.randn(100, 6), [30, 70])
    meta = torch.device("meta")
    assert {found.device for found in statistics.mean_and_std(meta) if found is not None} == {meta}
    statistics.update(torch.zeros(13, dtype=torch.float64))  # sums come from the host
    anew = FeatureStatistics("center")
    anew.mean_and_std(meta)
    anew.update(torch.zeros(13, dtype=torch.float64))
    assert anew.sums(torch.randn(4, 6, device=meta), torch.ones(4, dtype=torch.bool, device=meta)).device == meta


@pytest.mark.parametrize(
    "rows",
    [
        torch.full((50, 50), 0.1) + torch.linspace(0, 3, 50),  # features that do not vary
        3e3 + torch.randn(50, 50, generator=torch.Generator().manual_seed(0)),  # that vary little beside their mean
        torch.randn(1, 100, generator=torch.Generator().manual_seed(0)),  # one counted token
    ],
    ids=["constant", "large mean", "one token"],
)
@pytest.mark.parametrize("batches", [1, 3])
def test_deviations_are_finite_whatever_the_features(rows, batches):
    mean, std = fed("standardize", rows.repeat(batches, 1), [len(rows)] * batches).mean_and_std(CPU)
    torch.testing.assert_close(mean, rows.double().mean(dim=0).float())
    assert torch.isfinite(std).all() and (std > 0).all()
    wanted = rows.double().std(dim=0, correction=0).float()
    varies = wanted > 1e-3
    torch.testing.assert_close(std[varies], wanted[varies], rtol=1e-3, atol=0)
