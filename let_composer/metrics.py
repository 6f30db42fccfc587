"""Sums over the microbatches and ranks of one batch."""

import torch
from composer.utils import dist
from torch import Tensor

__all__ = ["BatchSums"]


class BatchSums:
    """Sums of one batch, in fp64 on the device, so that counting makes nobody wait.

    Every rank has to add the same names in the same order.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Add what one microbatch contributes; each value is a scalar or a vector."""
        for name, value in values.items():
            value = value.detach().double().reshape(-1)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def clear(self) -> None:
        """Forget the batch."""
        self._sums = {}

    def reduce(self) -> dict[str, Tensor]:
        """The sums over all ranks, on the host, by one collective and one copy; forgets the batch."""
        flat = torch.cat(list(self._sums.values()))
        dist.all_reduce(flat)
        flat = flat.cpu()
        sizes = [value.numel() for value in self._sums.values()]
        reduced = dict(zip(self._sums, flat.split(sizes), strict=True))
        self.clear()
        return reduced
