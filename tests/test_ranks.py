"""Two gloo ranks: the same collectives, together the gradient of one rank, and checkpoints that go on elsewhere."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import allow_fsdp_without_cuda, assert_close, build_data, load_tokenizer, metrics, parameters
from ranks import CASES, RESUMED, resumable

from let_composer import LET

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@contextmanager
def one_rank() -> Iterator[None]:
    """FSDP2 needs a process group, even of one; and it warns that it is experimental."""
    with warnings.catch_warnings(), patch.dict(os.environ), patch("torch.cuda.current_device"):
        warnings.simplefilter("ignore")
        allow_fsdp_without_cuda()
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def loaded(teacher_folder) -> Any:
    """The tokenizer as it comes from disk: sharded checkpoints hold its files, and go on only where these are equal."""
    return load_tokenizer(teacher_folder)


@pytest.fixture(scope="module")
def checkpoints(loaded, teacher_folder, tmp_path_factory) -> Path:
    """Where one rank and two have left theirs, and what two ranks saw: one launch, as imports take most of its time."""
    out = tmp_path_factory.mktemp("ranks")
    with one_rank():
        resumable(loaded, teacher_folder, out, save="one")
        resumable(loaded, None, out, save="one_plain", max_duration="3ba")
        resumable(loaded, teacher_folder, out, fsdp="sharded", save="one_sharded")
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", "tests/ranks.py", teacher_folder, str(out)]
    ones = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "TRITON_INTERPRET"), "1")
    environment = {**os.environ, **ones, "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def results(checkpoints) -> list[dict[str, Any]]:
    return [torch.load(checkpoints / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def single(tokenizer, teacher_folder, train) -> Any:
    return train(
        LET(teacher_folder, stop="3ba", weight="auto", normalize_teacher="standardize"),
        data=build_data(tokenizer, ragged=True),
        max_duration="4ba",
    )


@pytest.fixture(scope="module")
def uninterrupted(loaded, teacher_folder, tmp_path_factory) -> dict[str, list[float]]:
    return resumable(loaded, teacher_folder, tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_log_and_train_what_one_does_on_the_whole_batch(results, single, case):
    first, second = (result[case]["metrics"] for result in results)
    assert first == second
    for name, values in first.items():
        assert values == pytest.approx(metrics(single, name), rel=1e-5, abs=1e-7), name
    for result in results:
        assert_close(parameters(single), result[case]["parameters"])
        if "compile_config" not in CASES[case]:  # the block is seen once per forward, and with a gradient
            assert result[case]["fired"] == [True] * (8 if "microbatches" in case else 4)


def test_refused_on_every_rank(results):
    for result in results:
        assert "does not work with device_train_microbatch_size: auto" in result["refused"]["shard_auto"]
        assert "LET does not run with tensor parallelism" in result["refused"]["tp"]


class TestResume:
    """Losses go on along the curve of one rank that never stopped, whoever saved and whoever loads."""

    def assert_goes_on(self, found: dict[str, list[float]], whole: dict[str, list[float]], batch: int) -> None:
        for name, guided in (("loss/train/total", False), ("let/loss", True), ("let/lm_loss", True)):
            assert len(whole[name]) == (5 if guided else 8)
            assert found.get(name, []) == pytest.approx(whole[name][batch:], rel=1e-4), name

    @pytest.mark.parametrize("kind", ["sharded", "full", "fsdp1"])
    def test_uninterrupted_on_two_ranks(self, results, uninterrupted, kind):
        self.assert_goes_on(results[0]["saved"][kind], uninterrupted, 0)

    @pytest.mark.parametrize("name", RESUMED)
    def test_on_two_ranks(self, results, uninterrupted, name):
        assert results[0]["resumed"][name] == results[1]["resumed"][name]
        self.assert_goes_on(results[0]["resumed"][name], uninterrupted, 3)

    @pytest.mark.parametrize(
        "options", [{"load": "full/ep0-ba3-rank0.pt"}, {"fsdp": "sharded", "load": "sharded/ep0-ba3"}]
    )
    def test_from_two_ranks_on_one(self, checkpoints, loaded, teacher_folder, uninterrupted, options):
        with one_rank():
            found = resumable(loaded, teacher_folder, checkpoints, **options)
        self.assert_goes_on(found, uninterrupted, 3)

    def test_after_the_end_no_teacher_is_loaded(self, results, uninterrupted):
        over = results[0]["resumed"]["over"]  # its teacher does not exist
        assert over.keys() == {"loss/train/total"}
        self.assert_goes_on(over, uninterrupted, 6)

    @pytest.mark.parametrize(("name", "load", "guided"), [("added", "one_plain", 2), ("removed", "one", 0)])
    def test_let_added_or_removed(self, results, checkpoints, loaded, teacher_folder, name, load, guided):
        """As on one rank that does the same."""
        with one_rank():
            teacher = teacher_folder if name == "added" else None
            single = resumable(loaded, teacher, checkpoints, load=f"{load}/ep0-ba3-rank0.pt")
        found = results[0]["resumed"][name]
        assert found.keys() == single.keys() and len(found.get("let/loss", [])) == guided
        for curve, values in found.items():
            assert values == pytest.approx(single[curve], rel=1e-4), curve
