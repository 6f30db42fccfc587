"""Running mean and deviation of the teacher's features, over every guided token and rank so far."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from let_composer.loss import Implementation, feature_sums

__all__ = ["FeatureStatistics", "Normalize"]

log = logging.getLogger(__name__)

Normalize = Literal["none", "center", "standardize"]

# A feature that deviates less than this share of the average feature counts as constant; dividing by its deviation
# would blow up its rounding error.
_SMALLEST_DEVIATION = 1e-3


class FeatureStatistics:
    """Statistics of a frozen teacher do not drift, so all tokens weigh the same: a cumulative mean, no momentum.

    Sums are taken around the current mean, which keeps the variance exact where a feature's mean is large beside its
    deviation, as in the few features that carry most of a language model's hidden states.

    Args:
        normalize: ``"none"`` keeps nothing, ``"center"`` the mean, ``"standardize"`` mean and deviation.
        implementation: As in :func:`let_composer.loss.alignment_loss`. Default: ``"auto"``.
    """

    def __init__(self, normalize: Normalize, implementation: Implementation = "auto") -> None:
        self.normalize: Normalize = normalize
        self._implementation: Implementation = implementation
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
        shift = None if self._moments is None else self._moments[1].float()
        return feature_sums(features, mask, shift, implementation=self._implementation)

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
        """Take over statistics, if they are kept and were kept; what is not finite starts anew, with a warning."""
        if self.normalize == "none" or state["moments"] is None:
            return
        moments = torch.tensor(state["moments"], dtype=torch.float64)
        if torch.isfinite(moments).all():
            moments[2].clamp_(min=0)
            self._moments = moments
        else:
            log.warning("the checkpoint's statistics of the teacher's features are not finite: they start anew.")
