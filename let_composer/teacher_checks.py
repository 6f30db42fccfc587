"""What is required of a teacher before it runs, and the name of its weights. On the CPU, in fp32, with few tokens."""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from let_composer.teacher import Teacher

__all__ = ["check_causal", "check_finite", "check_head", "fingerprint", "separates_documents"]

_LENGTH = 16  # of the sequences that are tried
_CHUNK = 2**22  # elements that are summed at once
_TOLERANCE = 1e-4  # of the largest value; fp32 in another order stays far below


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash over names, shapes and values. These are rounded to bf16 first, as some devices hold them so."""
    content = hashlib.sha256()
    for name, p in parameters:
        chunks = p.detach().reshape(-1).split(_CHUNK)
        sums = torch.stack([c.to(torch.bfloat16).view(torch.int16).sum(dtype=torch.int64) for c in chunks])
        content.update(f"{name} {tuple(p.shape)} {sums.tolist()};".encode())
    return content.hexdigest()[:12]


def check_finite(name: str, module: nn.Module) -> None:
    """Raise a ValueError where weights are NaN or infinite."""
    parameters = list(module.named_parameters())
    bad = [path for path, p in parameters if not torch.stack(torch.aminmax(p.detach())).isfinite().all()]
    if bad:
        raise ValueError(
            f"teacher {name!r} has weights that are NaN or infinite in {len(bad)} of {len(parameters)} parameters, for "
            f"example {bad[0]}. Is the checkpoint of a run that diverged, or damaged? Choose another."
        )


def check_causal(teacher: "Teacher") -> None:
    """Raise a ValueError if the hidden states depend on later tokens, or are not finite."""
    ids = _random_ids(teacher)
    half = ids.shape[1] // 2
    before = teacher.hidden(ids)
    after = teacher.hidden(torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1))
    if not (before.isfinite().all() and after.isfinite().all()):
        raise ValueError(
            f"teacher {teacher.name!r} has hidden states that are NaN or infinite, in fp32 and for ordinary tokens. "
            "They would guide nothing. Choose another checkpoint."
        )
    if _differ(before[:, :half], after[:, :half]):
        raise ValueError(
            f"teacher {teacher.name!r} is not a causal decoder: its hidden states depend on later tokens and would "
            "tell the student the answers. Choose a causal language model."
        )


@torch.no_grad()
def check_head(teacher: "Teacher", model: Any) -> None:
    """Raise a ValueError if the logits are not those of the ``model`` that the teacher's body and head are from."""
    ids = _random_ids(teacher)
    expected, found = model(input_ids=ids).logits, teacher.project(teacher.hidden(ids))
    if _differ(found, expected):
        ratio = float((expected * found).sum() / found.square().sum())
        raise ValueError(
            f"teacher {teacher.name!r} ({type(model).__name__}) does more to its logits than its LM head: they are "
            f"about {ratio:.3g} times as large. Distillation does not support that. Choose another teacher."
        )


def separates_documents(teacher: "Teacher") -> bool:
    """Whether a document in a packed row gets the hidden states that it has alone."""
    ids = _random_ids(teacher)
    half = ids.shape[1] // 2
    documents = (torch.arange(ids.shape[1]) >= half).long()[None]
    try:
        packed = teacher.packed(ids, documents)[:, half:]
    except Exception:  # whatever a model says that expects another mask
        return False
    return not _differ(packed, teacher.hidden(ids[:, half:]))


def _random_ids(teacher: "Teacher") -> Tensor:
    length = min(_LENGTH, teacher.rows, teacher.context or _LENGTH)
    return torch.randperm(teacher.rows, generator=torch.Generator().manual_seed(0))[:length][None]


def _differ(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() > _TOLERANCE * second.abs().max())
