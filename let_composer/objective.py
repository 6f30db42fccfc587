"""What the student is trained on: which tokens count, and a term joined to a loss of any form. Pure functions."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["language_model_loss", "logits_of", "loss_generating", "plus", "total"]

_IGNORED = -100  # label of a token that generates no loss, in llm-foundry and Hugging Face


def loss_generating(labels: Tensor) -> Tensor:
    """The positions whose next token is predicted, of labels ``[B, S]``, boolean: those that Composer counts and the
    student's loss averages over.
    """
    return F.pad(labels[:, 1:] != _IGNORED, (0, 1), value=False)


def total(loss: Any) -> Tensor:
    """The scalar that Composer would train on, of a tensor, a tuple or list of tensors, or a mapping, with ``total`` or
    without.
    """
    if isinstance(loss, Mapping):
        return loss["total"].mean() if "total" in loss else total(tuple(loss.values()))
    if isinstance(loss, (tuple, list)):
        return torch.stack([part.mean() for part in loss]).sum()
    return loss.mean()


def language_model_loss(loss: Any) -> Tensor:
    """The part of a loss that is about tokens: without the balancing loss that a mixture of experts adds, where the
    model keeps the two apart.
    """
    return loss["loss"].mean() if isinstance(loss, Mapping) and "loss" in loss else total(loss)


def plus(loss: Any, term: Tensor) -> Any:
    """``loss + term`` in the type that came in: some callbacks read only tensors, mixtures of experts return dicts."""
    if isinstance(loss, Mapping):
        return {**loss, "total": total(loss) + term}
    if isinstance(loss, (tuple, list)):
        parts = [loss[0] + term, *loss[1:]]
        return type(loss)(*parts) if hasattr(loss, "_fields") else type(loss)(parts)
    return loss + term


def logits_of(outputs: Any) -> Tensor:
    """The student's logits ``[B, S, V]`` in what its forward returned: a mapping with ``logits``, or a tuple that holds
    them, as from a model with ``return_dict: false``.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    parts = outputs if isinstance(outputs, (tuple, list)) else [getattr(outputs, "logits", outputs)]
    for part in parts:
        if isinstance(part, Tensor) and part.dim() == 3:
            return part
    raise ValueError(
        "expected the student's logits [B, S, V] in what its forward returns, but got "
        f"{type(outputs).__name__} without them. LET needs none where its weight is a number; RKD, SALT and "
        "weight: auto compare predictions. Causal language models of llm-foundry and Hugging Face return them."
    )
