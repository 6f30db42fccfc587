"""Two gloo ranks: the same collectives in the same order, and together the gradient of one rank on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_data, metrics, parameters
from ranks import CASES

from let_composer import LET


@pytest.fixture(scope="module")
def results(teacher_folder, tmp_path_factory) -> list[dict[str, Any]]:
    """Of both ranks, for every case; one launch for all of them, because imports take most of its time."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", "tests/ranks.py", teacher_folder, str(out)]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def single(tokenizer, teacher_folder, train) -> Any:
    return train(
        LET(teacher_folder, stop="3ba", weight=1.0, normalize_teacher="standardize"),
        data=build_data(tokenizer, ragged=True),
        max_duration="4ba",
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_both_ranks_log_the_same_and_what_one_rank_logs(results, single, case):
    first, second = (result[case]["metrics"] for result in results)
    assert first == second
    for name, values in first.items():
        assert values == pytest.approx(metrics(single, name), rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_one_rank_on_the_whole_batch(results, single, case):
    for result in results:
        found = result[case]["parameters"]
        assert found.keys() == parameters(single).keys()
        for name, value in parameters(single).items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
