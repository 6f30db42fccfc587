"""The teacher's start on four ranks, two nodes of two: one verdict for all, and a share for each rank of a node."""

import re
from typing import Any

import pytest
import torch
from composer.utils import dist
from conftest import copy_teacher, load_tokenizer, spawn
from transformers import LlamaForCausalLM

from let_composer.teacher import load_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def refused(name: str, vocabulary: dict[int, str], **options: Any) -> str:
    try:
        load_teacher(name, vocabulary, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def start(teacher: str, out: str) -> dict[str, Any]:
    """What one rank saw; ``out`` has teachers, one with other weights and one that is broken."""
    rank = dist.get_global_rank()
    vocabulary = {index: token for token, index in load_tokenizer(teacher).get_vocab().items()}
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
        "other": refused(teacher if rank < 2 else f"{out}/other", vocabulary),
        "missing": refused(teacher if rank != 3 else "./nowhere", vocabulary),
        "broken": refused(f"{out}/broken", vocabulary),
        "vocabulary": refused(teacher, {0: "x"}),
    }


@pytest.fixture(scope="module")
def ranks(teacher_folder, tmp_path_factory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    for name, value in (("other", 0.5), ("broken", float("nan"))):
        copy_teacher(
            teacher_folder, out / name, lambda model, value=value: model.model.norm.weight.data[0].fill_(value)
        )
    return spawn(start, 2, out, teacher_folder, str(out))


def test_every_rank_has_it_whole_or_its_share_within_the_node(ranks, teacher_folder):
    expected = LlamaForCausalLM.from_pretrained(teacher_folder).eval()(torch.arange(16).view(2, 8)).logits
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], expected)
        torch.testing.assert_close(rank["shared"], expected)
        assert rank["share"] == ((24, 48), (12, 48))  # of two ranks, not of four
        assert rank["separates"] and len({f for r in ranks for f in r["fingerprints"]}) == 1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other", r"expected the same teacher on every rank.*\(ranks 0, 1 .*; ranks 2, 3 "),
        ("missing", "there is no teacher at './nowhere'"),
        ("broken", "weights that are NaN or infinite"),  # only the first rank of a node checks
        ("vocabulary", "has another vocabulary"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(ranks, case, message):
    assert all(re.search(message, rank[case]) for rank in ranks)
