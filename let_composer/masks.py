"""Which token may see which, and where documents begin. Pure functions, without a look into a device's memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["block_diagonal", "needs_mask", "positions"]


def positions(sequence_id: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Place of every token in its document, ``[B, S]``, from 0.

    Args:
        sequence_id: ``[B, S]``, another number for every document than for the one before.
        attention_mask: ``[B, S]``; padding is a document of its own. Default: ``None``, no padding.
    """
    new = sequence_id[:, 1:] != sequence_id[:, :-1]
    if attention_mask is not None:
        new = new | (attention_mask[:, 1:] != attention_mask[:, :-1])
    index = torch.arange(sequence_id.shape[1], device=sequence_id.device)
    return index - F.pad(torch.where(new, index[1:], 0), (1, 0)).cummax(-1).values


def block_diagonal(position: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to the scores ``[B, 1, S, S]``, lets a token see only itself and what precedes it in its document.

    Args:
        position: Of :func:`positions`.
        dtype: Of the scores.
    """
    index = torch.arange(position.shape[1], device=position.device)
    start = index - position
    unseen = (start[:, :, None] != start[:, None, :]) | (index[None, :] > index[:, None])
    mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
    return mask.masked_fill_(unseen, torch.finfo(dtype).min)[:, None]


def needs_mask(attention_mask: Tensor | None) -> bool:
    """Whether a causal decoder must be told of the padding: not if all of it comes after the tokens, which then never
    attend to it.

    Without a mask attention takes its fast causal path, and transformers does not look into one, for which the host
    would wait for the device.

    Args:
        attention_mask: ``[B, S]``, 0 or False where there is padding. If it is on an accelerator already, looking into
            it would cost that wait, and the answer is yes.
    """
    if attention_mask is None:
        return False
    if attention_mask.device.type != "cpu":
        return True
    tokens = attention_mask != 0
    return bool((tokens[:, 1:] & ~tokens[:, :-1]).any())
