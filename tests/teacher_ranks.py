"""One of four ranks on two nodes of two, on the CPU, started by test_teacher_ranks.py."""

import os
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from transformers import PreTrainedTokenizerFast

from let_composer.teacher import load_teacher


def refused(name: str, vocabulary: dict[int, str], **options: Any) -> str:
    try:
        load_teacher(name, vocabulary, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def main(rank: int, port: int, teacher: str, out: str) -> None:
    """Writes what this rank saw; ``out`` also has teachers, one with other weights and one that is broken."""
    place = {"RANK": rank, "LOCAL_RANK": rank % 2, "NODE_RANK": rank // 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update({name: str(value) for name, value in (place | address).items()})
    torch.set_num_threads(1)
    dist.initialize_dist("cpu", timeout=60)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    ids = torch.arange(16).view(2, 8)
    whole = load_teacher(teacher, vocabulary, head=True)
    shared = load_teacher(teacher, vocabulary, placement="shard", head=True)
    weight: Any = shared.body.layers[0].mlp.down_proj.weight
    results = {
        "logits": whole.logits(ids),
        "shared": shared.logits(ids),
        "share": (tuple(weight.shape), tuple(weight.to_local().shape)),
        "fingerprints": (whole.fingerprint, shared.fingerprint),
        "separates": whole.separates_documents,
        "other": refused(teacher if rank < 2 else os.path.join(out, "other"), vocabulary),
        "missing": refused(teacher if rank != 3 else "./nowhere", vocabulary),
        "broken": refused(os.path.join(out, "broken"), vocabulary),
        "vocabulary": refused(teacher, {0: "x"}),
    }
    torch.save(results, Path(out, f"rank{rank}.pt"))
    dist.barrier()
    os._exit(0)  # gloo's taking down hangs now and then where a rank of another group has left already
