"""Running mean and deviation of the teacher's features, over every guided token and rank so far."""

from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "Normalize"]

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
    """

    def __init__(self, normalize: Normalize) -> None:
        self.normalize: Normalize = normalize
        self._moments: Tensor | None = None  # [3, D] fp64: number of tokens (repeated), mean, sum of squared deviations

    def mean_and_std(self) -> tuple[Tensor | None, Tensor | None]:
        """What to subtract from and divide teacher features by, each ``[D]`` in fp32 or ``None``."""
        if self._moments is None:
            return None, None
        count, mean, squares = self._moments
        if self.normalize == "center":
            return mean.float(), None
        std = (squares / count.clamp(min=1)).sqrt()
        std = std.clamp(min=std.mean() * _SMALLEST_DEVIATION)
        return mean.float(), torch.where(count > 0, std, 1).float()

    def sums(self, features: Tensor, mask: Tensor) -> Tensor:
        """Sums to be added up over microbatches and ranks and given to :meth:`update`; empty when nothing is kept.

        Args:
            features: ``[..., D]``.
            mask: The tokens that count, boolean ``[...]``. Rows that are not finite are left out.
        """
        if self.normalize == "none":
            return features.new_empty(0)
        rows = features.flatten(0, -2).float()
        if self._moments is not None:
            rows = rows - self._moments[1].float()
        usable = mask.flatten() & torch.isfinite(rows).all(dim=-1)
        rows = torch.where(usable[:, None], rows, 0)
        count = usable.sum().double().expand(rows.shape[-1])
        return torch.cat([count, rows.sum(dim=0).double(), rows.square().sum(dim=0).double()])

    def update(self, sums: Tensor) -> None:
        """Merge one batch (Chan's parallel variance)."""
        if self.normalize == "none":
            return
        new, total, squares = sums.view(3, -1)
        count, mean, deviation = torch.zeros_like(sums.view(3, -1)) if self._moments is None else self._moments
        shift = total / new.clamp(min=1)  # of the batch's mean against the old one
        merged = (count + new).clamp(min=1)
        self._moments = torch.stack(
            [
                count + new,
                mean + shift * new / merged,
                deviation + squares - new * shift.square() + shift.square() * count * new / merged,
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, so that every kind of checkpoint can carry them."""
        return {
            "normalize": self.normalize,
            "moments": None if self._moments is None else self._moments.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over statistics, if they are kept and were kept; on the CPU until :meth:`to`."""
        if self.normalize != "none" and state["moments"] is not None:
            self._moments = torch.tensor(state["moments"], dtype=torch.float64)

    def to(self, device: torch.device) -> None:
        """Move to where the features are."""
        if self._moments is not None:
            self._moments = self._moments.to(device)
