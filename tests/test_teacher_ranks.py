"""The teacher's start on four ranks, two nodes of two: one verdict for all, and a share for each rank of a node."""

import socket
from typing import Any

import pytest
import teacher_ranks
import torch
import torch.multiprocessing
from conftest import copy_teacher
from transformers import LlamaForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ranks(teacher_folder, tmp_path_factory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    for name, value in (("other", 0.5), ("broken", float("nan"))):
        copy_teacher(
            teacher_folder, out / name, lambda model, value=value: model.model.norm.weight.data[0].fill_(value)
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(teacher_ranks.main, (port, teacher_folder, str(out)), nprocs=4, daemon=True)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(4)]


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
        ("other", "expected the same teacher on every rank"),
        ("missing", "there is no teacher at './nowhere'"),
        ("broken", "weights that are NaN or infinite"),  # only the first rank of a node checks
        ("vocabulary", "has another vocabulary"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(ranks, case, message):
    assert all(message in rank[case] for rank in ranks)
