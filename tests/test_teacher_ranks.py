"""The teacher's start on four ranks, two nodes of two: one verdict for all, and a share for each rank of a node."""

from typing import Any

import pytest
import torch
from composer.utils import dist
from conftest import copy_teacher, load_tokenizer, spawn
from transformers import LlamaForCausalLM

from let_composer.teacher import load_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def start(teacher: str, out: str) -> dict[str, Any]:
    """What one rank saw; ``out`` has teachers, one with other weights and one that is broken."""
    rank = dist.get_global_rank()
    vocabulary = {index: token for token, index in load_tokenizer(teacher).get_vocab().items()}
    for name, words, message in (
        (teacher if rank < 2 else f"{out}/other", vocabulary, r"the same teacher on .*\(ranks 0, 1 .*; ranks 2, 3 "),
        (teacher if rank < 2 else "./nowhere", vocabulary, "there is no teacher at './nowhere'"),
        (teacher if rank != 3 else "./nowhere", vocabulary, "there is no teacher at './nowhere'"),
        (f"{out}/broken", vocabulary, "weights that are NaN or infinite"),  # only the first rank of a node checks
        (teacher, {0: "x"}, "has another vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            load_teacher(name, words)
    ids = torch.arange(16).view(2, 8)
    whole = load_teacher(teacher, vocabulary, head=True)
    shared = load_teacher(teacher, vocabulary, placement="shard", head=True)
    weight: Any = shared.body.layers[0].mlp.down_proj.weight
    return {
        "logits": whole.project(whole.hidden(ids)),
        "shared": shared.project(shared.hidden(ids)),
        "share": (tuple(weight.shape), tuple(weight.to_local().shape)),
        "fingerprints": (whole.fingerprint, shared.fingerprint),
        "separates": whole.separates_documents,
    }


def test_every_rank_has_it_whole_or_its_share_within_the_node_or_the_error_of_any(teacher_folder, tmp_path):
    for name, value in (("other", 0.5), ("broken", float("nan"))):
        copy_teacher(
            teacher_folder, tmp_path / name, lambda model, value=value: model.model.norm.weight.data[0].fill_(value)
        )
    ranks = spawn(start, 2, tmp_path, teacher_folder, str(tmp_path))
    expected = LlamaForCausalLM.from_pretrained(teacher_folder).eval()(torch.arange(16).view(2, 8)).logits
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], expected)
        torch.testing.assert_close(rank["shared"], expected)
        assert rank["share"] == ((24, 48), (12, 48))  # of two ranks, not of four
        assert rank["separates"] and len({f for r in ranks for f in r["fingerprints"]}) == 1
