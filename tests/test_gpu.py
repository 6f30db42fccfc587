"""What only a CUDA device can show, on one of them: FSDP units, mixed precision, memory, host syncs, torch.compile."""

from typing import Any

import pytest
import torch
from composer import Event, State
from composer.loggers import Logger
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from conftest import build_data, metrics

from let_composer import LET

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of FSDP, torch.compile and their loggers; what is tested is the run
]

GUIDED = {"stop": "3ba", "weight": 1.0, "normalize_teacher": "standardize"}
each_weight = pytest.mark.parametrize("weight", ["auto", 1.0])


@pytest.fixture
def run(train, tokenizer, teacher_folder):
    def run(method: Any = LET, weight: Any = 1.0, device: str = "gpu", **options: Any) -> Any:
        algorithms = [method(teacher_folder, **{**GUIDED, "weight": weight})] if method else []
        return train(*algorithms, device=device, data=build_data(tokenizer, ragged=True), max_duration="5ba", **options)

    return run


def assert_alike(found: Any, expected: Any, slack: float = 5e-3) -> None:
    assert metrics(found, "loss/train/total") == pytest.approx(metrics(expected, "loss/train/total"), abs=slack)
    assert metrics(found, "let/loss") == pytest.approx(metrics(expected, "let/loss"), abs=4 * slack)
    assert len(metrics(found, "let/loss")) == 3


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (None, {}),
        (None, {"device_train_microbatch_size": 2}),
        (FSDPConfig, {}),
        (FSDPConfig, {"activation_checkpointing": True, "activation_checkpointing_reentrant": False}),
        (FSDPConfig, {"activation_checkpointing": True}),
        (FSDP2Config, {}),
        (FSDP2Config, {"activation_checkpointing": True}),
    ],
)
def test_every_wrapping_trains_as_the_cpu_does(run, config, options):
    found = run(parallelism_config={"fsdp": config(**options)}) if config else run(**options)
    assert_alike(found, run(device="cpu"))  # apart from the teacher, which runs in bf16 on the device


@each_weight
@pytest.mark.parametrize(("options", "slack"), [({"precision": "amp_bf16"}, 5e-2), ({"compile_config": {}}, 5e-3)])
def test_mixed_precision_and_compiled(run, weight, options, slack):
    assert_alike(run(weight=weight, **options), run(weight=weight), slack)


@each_weight
def test_a_guided_microbatch_never_waits_for_the_device(run, weight):
    class Strict(LET):
        def apply(self, event: Event, state: State, logger: Logger) -> None:
            strict = event in (Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_LOSS)
            torch.cuda.set_sync_debug_mode("error" if strict else "default")
            try:
                super().apply(event, state, logger)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    assert len(metrics(run(Strict, weight), "let/loss")) == 3


def test_memory_after_the_stop_is_that_of_a_run_without(run):
    def allocated(method: Any) -> int:
        trainer = run(method)
        torch.cuda.synchronize()
        size = torch.cuda.memory_allocated()
        trainer.close()
        return size

    without = allocated(None)
    assert abs(allocated(LET) - without) <= 2**20
