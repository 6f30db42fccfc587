"""Running mean and deviation of the teacher's features, over every guided token and rank so far."""

from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "Normalize"]

Normalize = Literal["none", "center", "standardize"]

# A feature that deviates less than this share of the average feature counts as constant; dividing by its deviation
# would blow up its rounding error.
_SMALLEST_DEVIATION = 1e-3

_ROWS = 4096  # that are converted at a time


class FeatureStatistics:
    """Statistics of a frozen teacher do not drift, so all tokens weigh the same: a cumulative mean, no momentum.

    Sums are taken around the current mean, which keeps the variance exact where a feature's mean is large beside its
    deviation, as in the few features that carry most of a language model's hidden states.

    Args:
        normalize: ``"none"`` keeps nothing, ``"center"`` the mean, ``"standardize"`` mean and deviation.
    """

    def __init__(self, normalize: Normalize) -> None:
        self.normalize: Normalize = normalize
        self._device = torch.device("cpu")
        self._moments: Tensor | None = None  # [3, D] fp64: number of tokens (repeated), mean, sum of squared deviations

    def mean_and_std(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What to subtract from and divide teacher features by, each ``[D]`` in fp32 or ``None``.

        Args:
            device: Where the features are; the statistics stay there from then on.
        """
        self._device = device
        if self._moments is None:
            return None, None
        self._moments = self._moments.to(device)
        count, mean, squares = self._moments
        if self.normalize == "center":
            return mean.float(), None
        std = (squares / count.clamp(min=1)).sqrt()
        std = std.clamp(min=std.mean() * _SMALLEST_DEVIATION)
        return mean.float(), torch.where(std > 0, std, 1).float()  # all constant, or nothing counted yet: not divided

    def sums(self, features: Tensor, mask: Tensor) -> Tensor:
        """Sums to be added up over microbatches and ranks and given to :meth:`update`; empty when nothing is kept.

        Args:
            features: ``[..., D]``.
            mask: The tokens that count, boolean ``[...]``. Rows that are not finite are left out.
        """
        if self.normalize == "none":
            return features.new_empty(0)
        # The first batch's are summed in fp64: fp32 would cancel where a mean is large beside its deviation.
        dtype, shift = (torch.float64, 0.0) if self._moments is None else (torch.float32, self._moments[1].float())
        width = features.shape[-1]
        total = torch.zeros(1 + 2 * width, dtype=torch.float64, device=features.device)
        for rows, counted in zip(features.reshape(-1, width).split(_ROWS), mask.reshape(-1).split(_ROWS), strict=True):
            used = counted & torch.isfinite(rows).all(dim=-1)
            rows = torch.where(used[:, None], rows.to(dtype) - shift, 0)
            total = total + torch.cat([used.sum().view(1), rows.sum(dim=0), rows.square().sum(dim=0)])
        return total

    def update(self, sums: Tensor) -> None:
        """Merge one batch (Chan's parallel variance).

        Args:
            sums: Of :meth:`sums`, on any device.
        """
        if self.normalize == "none":
            return
        sums = sums.to(self._device)
        new, (total, squares) = sums[0], sums[1:].view(2, -1)
        if self._moments is None:
            self._moments = torch.zeros(3, len(total), dtype=sums.dtype, device=sums.device)
        count, mean, deviation = self._moments
        found = total / new.clamp(min=1)  # the batch's mean, around what the sums were taken around
        shift = found + mean.float() - mean
        merged = (count + new).clamp(min=1)
        squares = (squares - new * found.square()).clamp(min=0)  # rounding may leave a constant feature below 0
        self._moments = torch.stack(
            [
                count + new,
                mean + shift * new / merged,
                deviation + squares + shift.square() * count * new / merged,
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, so that every kind of checkpoint can carry them."""
        return {"moments": None if self._moments is None else self._moments.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over statistics, if they are kept and were kept."""
        if self.normalize != "none" and state["moments"] is not None:
            self._moments = torch.tensor(state["moments"], dtype=torch.float64)
