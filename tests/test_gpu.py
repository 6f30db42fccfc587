"""What only a CUDA device can show, on one of them: FSDP units, mixed precision, memory, host syncs, torch.compile."""

from typing import Any

import pytest
import torch
from composer import Event, State
from composer.loggers import Logger
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from conftest import assert_equal, build_data, build_student, metrics, parameters

from let_composer import LET

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of FSDP, torch.compile and their loggers; what is tested is the run
]

GUIDED = {"stop": "3ba", "weight": 1.0, "normalize_teacher": "standardize"}
each_weight = pytest.mark.parametrize("weight", ["auto", 1.0])
WRAPPINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (None, {}),
    "fsdp1": (FSDPConfig, {}),
    "fsdp1, recomputed": (FSDPConfig, {"activation_checkpointing": True, "activation_checkpointing_reentrant": False}),
    "fsdp1, recomputed reentrantly": (FSDPConfig, {"activation_checkpointing": True}),
    "fsdp2": (FSDP2Config, {}),
    "fsdp2, recomputed": (FSDP2Config, {"activation_checkpointing": True}),
}


@pytest.fixture
def run(train, tokenizer, teacher_folder):
    def run(method: Any = LET, guidance: Any = None, **overrides: Any) -> Any:
        algorithms = [method(teacher_folder, **{**GUIDED, **(guidance or {})})] if method else []
        options = {"device": "gpu", "max_duration": "5ba", "data": build_data(tokenizer, ragged=True), **overrides}
        return train(*algorithms, **options)

    return run


def losses(trainer: Any) -> list[float]:
    return [float(x) for x in metrics(trainer, "loss/train/total")]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_trains_as_the_cpu_does(run, wrapping):
    config, fsdp = WRAPPINGS[wrapping]
    found = run(parallelism_config=None if config is None else {"fsdp": config(**fsdp)})
    expected = run(device="cpu")
    # The teacher runs in bf16 on the device.
    assert losses(found) == pytest.approx(losses(expected), abs=5e-3)
    assert metrics(found, "let/loss") == pytest.approx(metrics(expected, "let/loss"), abs=2e-2)
    assert len(metrics(found, "let/loss")) == 3


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_microbatches_give_the_gradient_of_the_batch(run, implementation):
    whole, parts = (
        run(guidance={"implementation": implementation}, device_train_microbatch_size=size) for size in (8, 2)
    )
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parameters(parts)[name], value, rtol=1e-4, atol=1e-5)


@each_weight
@pytest.mark.parametrize(("options", "off"), [({"precision": "amp_bf16"}, 5e-2), ({"compile_config": {}}, 5e-3)])
def test_mixed_precision_and_a_compiled_student(run, weight, options, off):
    found, plain = (run(guidance={"weight": weight}, **more) for more in (options, {}))
    assert losses(found) == pytest.approx(losses(plain), abs=off)


def test_weight_zero_is_bit_identical_to_no_algorithm(run):
    assert_equal(parameters(run(guidance={"weight": 0.0})), parameters(run(None)))


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

    assert len(metrics(run(Strict, {"weight": weight}), "let/loss")) == 3


def test_memory_after_the_stop_is_that_of_a_run_without(run):
    def allocated(method: Any) -> int:
        trainer = run(method)
        torch.cuda.synchronize()
        size = torch.cuda.memory_allocated()
        trainer.close()
        return size

    without = allocated(None)
    assert abs(allocated(LET) - without) <= 2**20


def test_running_out_of_memory_is_retried_with_a_smaller_microbatch(run, tokenizer):
    """Composer's own search, made to fail by a cap on memory that the whole batch does not fit under."""

    def fit(size: int | str) -> tuple[list[float], int, int]:
        """Losses, the microbatch in the end, and the most memory."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trainer = run(
            guidance={"stop": "2ba", "normalize_teacher": "none"},
            model=build_student(tokenizer, d_model=512, n_heads=8),
            data=build_data(tokenizer, batch_size=128, samples=256),
            device_train_microbatch_size=size,
            max_duration="2ba",
        )
        trainer.close()
        found = losses(trainer) + metrics(trainer, "let/loss")
        return found, trainer.state.device_train_microbatch_size, torch.cuda.max_memory_reserved()

    expected, _, _ = fit(16)
    small, large = (fit(size)[2] for size in (16, 128))
    assert large > 1.3 * small, "the batch is too small to tell"
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total)
    try:
        found, size, _ = fit("auto")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert size < 128
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("config", [FSDPConfig, FSDP2Config], ids=["fsdp1", "fsdp2"])
def test_sharded_checkpoints_resume_as_if_never_stopped(run, tmp_path, config):
    sharded = {"fsdp": config(state_dict_type="sharded")}
    whole = run(parallelism_config=sharded, run_name="run", save_interval="2ba", save_folder=str(tmp_path))
    resumed = run(parallelism_config=sharded, load_path=str(tmp_path / "ep0-ba2"))
    assert losses(resumed) == pytest.approx(losses(whole)[2:], abs=1e-5)
    assert metrics(resumed, "let/loss") == pytest.approx(metrics(whole, "let/loss")[2:], abs=1e-5)
