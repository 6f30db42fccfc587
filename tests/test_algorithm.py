"""LET in a real Trainer: the invariants of the method, one by one, and bad input."""

import gc
import weakref
from typing import Any

import pytest
import torch
from composer import Callback, DataSpec, Evaluator
from composer.algorithms import EMA, GradientClipping
from composer.callbacks import SpeedMonitor
from composer.core import Event, Time
from composer.loggers import ProgressBarLogger
from conftest import LENGTH, build_data, build_student, metrics, parameters
from llmfoundry.callbacks.kill_loss_spike_callback import KillLossSpike
from llmfoundry.models.hf import ComposerHFCausalLM
from transformers import LlamaForCausalLM

from let_composer import LET, alignment_loss
from let_composer.algorithm import _GUIDED, plus, total
from let_composer.teacher import Teacher


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


class TestOff:
    """Invariant 1: weight 0 and a finished schedule are bit-identical to a run without LET."""

    def test_weight_zero(self, train, tokenizer):
        def run(*algorithms: Any) -> tuple[Any, torch.Tensor]:
            trainer = train(*algorithms, model=build_student(tokenizer, resid_pdrop=0.1))
            return trainer, torch.get_rng_state()

        (plain, state), (off, state_off) = run(), run(LET(teacher="./nowhere", weight=0))
        assert_equal(parameters(plain), parameters(off))
        assert torch.equal(state, state_off)
        assert metrics(plain, "loss/train/total") == metrics(off, "loss/train/total")
        assert not any(name.startswith("let/") for name in off.logger.destinations[0].data)

    def test_a_resume_after_the_end_loads_no_teacher_and_is_a_plain_run(self, train, teacher_folder, tmp_path):
        train(LET(teacher_folder, stop="2ba", weight=1.0), save_folder=str(tmp_path), save_interval="3ba", run_name="r")
        load = {"load_path": str(tmp_path / "ep0-ba3-rank0.pt")}
        plain = train(**load)
        moved = LET("./nowhere", stop="2ba", weight=1.0)
        resumed = train(moved, **load)
        assert_equal(parameters(plain), parameters(resumed))
        assert moved._teacher is None and moved._events == {Event.INIT}


class TestSeparation:
    """Invariant 2: the teacher is nobody's parameter."""

    def test_not_in_the_checkpoint_nor_the_optimizer_nor_the_export(self, train, teacher_folder, tmp_path):
        plain = train(max_duration="1ba")
        guided = train(LET(teacher_folder, stop="4ba"), max_duration="4ba", fit=False)
        guided.fit(duration="1ba")
        assert guided.state.algorithms[0]._teacher is not None
        assert plain.state.state_dict()["model"].keys() == guided.state.state_dict()["model"].keys()
        count = [
            sum(p.numel() for g in t.state.optimizers[0].param_groups for p in g["params"]) for t in (plain, guided)
        ]
        assert count[0] == count[1]
        guided.state.model.model.save_pretrained(tmp_path)
        reloaded = Teacher(str(tmp_path))  # the student's export is a complete model, and could teach in turn
        assert reloaded.parameters < sum(p.numel() for p in guided.state.model.parameters())
        assert len(guided.state.state_dict()["algorithms"][0][1]["repr"]) < 300

    def test_the_state_is_plain(self, train, teacher_folder):
        algorithm = LET(teacher_folder, stop="4ba", normalize_teacher="standardize")
        train(algorithm, max_duration="4ba")

        def plain(value: Any) -> bool:
            if isinstance(value, dict):
                return all(plain(v) for v in value.values())
            if isinstance(value, list):
                return all(plain(v) for v in value)
            return value is None or type(value) in (str, int, float)

        assert plain(algorithm.state_dict())


class TestAccumulation:
    """Invariant 3: how a batch is cut into microbatches does not matter."""

    @pytest.mark.parametrize("on_tokens", [True, False])
    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize("normalize", ["none", "standardize"])
    def test_microbatches(self, train, tokenizer, teacher_folder, on_tokens, ragged, normalize):
        if ragged and not on_tokens:
            pytest.skip("Composer weights unequal microbatches by samples then, and so the student's own loss differs")

        def run(size: int):
            return train(
                LET(teacher_folder, stop="3ba", weight=1.0, normalize_teacher=normalize),
                data=build_data(tokenizer, ragged=ragged),
                device_train_microbatch_size=size,
                accumulate_train_batch_on_tokens=on_tokens,
                max_duration="3ba",
            )

        whole, parts = run(8), run(3)
        assert_close(parameters(whole), parameters(parts))
        for name in ("let/loss", "let/lm_loss", "let/cosine", "let/constant_cosine"):
            assert metrics(whole, name) == pytest.approx(metrics(parts, name), rel=1e-5)

    @pytest.mark.parametrize("needed", [False, True])
    def test_the_teacher_sees_padding_only_where_it_matters(
        self, train, tokenizer, teacher_folder, monkeypatch, needed
    ):
        seen, hidden = [], Teacher.hidden

        def spy(self: Teacher, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            seen.append(mask is not None)
            return hidden(self, ids, mask)

        monkeypatch.setattr(Teacher, "hidden", spy)
        if needed:  # as with padding in front, which MPT cannot train on
            monkeypatch.setattr("let_composer.algorithm.needs_mask", lambda mask: True)
        data = build_data(tokenizer, ragged=True)
        train(LET(teacher_folder, stop="2ba", weight=1.0), data=data, device_train_microbatch_size=4)
        assert seen == [needed] * 4

    def test_weighted_by_samples_as_composer_weights_the_students_loss(self, train, tokenizer, teacher_folder):
        data = build_data(tokenizer, ragged=True)
        batch = next(iter(data.dataloader))
        guided = train(
            LET(teacher_folder, stop="1ba", weight=0.5),
            data=data,
            device_train_microbatch_size=2,
            accumulate_train_batch_on_tokens=False,
            max_duration="1ba",
            lr=1.0,
        )
        model, teacher = build_student(tokenizer), Teacher(teacher_folder)
        for rows in torch.arange(8).split(2):
            part = {key: batch[key][rows] for key in ("input_ids", "labels", "attention_mask")}
            outputs = model.model(part["input_ids"], attention_mask=part["attention_mask"], output_hidden_states=True)
            mask = torch.nn.functional.pad(part["labels"][:, 1:] != -100, (0, 1))
            term = alignment_loss(
                outputs.hidden_states[3], teacher.hidden(part["input_ids"], part["attention_mask"]), mask
            )
            (0.25 * (model.loss(outputs, part) + 0.5 * term)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
        assert_close(dict(model.named_parameters()), parameters(guided))

    def test_what_is_logged_is_what_is_trained_on(self, train, tokenizer, teacher_folder):
        trainer = train(
            LET(teacher_folder, stop="6ba", weight=0.7),
            data=build_data(tokenizer, ragged=True),
            device_train_microbatch_size=3,
        )
        total = metrics(trainer, "loss/train/total")
        parts = zip(
            metrics(trainer, "let/lm_loss"), metrics(trainer, "let/weight"), metrics(trainer, "let/loss"), strict=False
        )
        assert total == pytest.approx([lm + weight * loss for lm, weight, loss in parts], rel=1e-5)
        assert metrics(trainer, "let/cosine") == [-loss for loss in metrics(trainer, "let/loss")]
        assert all(0 < share < 1 for share in metrics(trainer, "let/teacher_flops_share"))


class TestResume:
    """Invariant 4: stopping and resuming equals never having stopped."""

    @pytest.mark.parametrize(
        "options", [{}, {"normalize_teacher": "standardize"}, {"stop": "0.6dur", "anneal": "cosine"}]
    )
    def test_bitwise(self, train, teacher_folder, tmp_path, options):
        def algorithm() -> LET:
            return LET(teacher_folder, **{"stop": "5ba", "weight": 1.0, **options})

        save = {
            "save_folder": str(tmp_path),
            "save_interval": "2ba",
            "max_duration": "8ba",
            "optimizer": torch.optim.AdamW,
        }
        straight = train(algorithm(), **save, lr=1e-2)
        resumed = train(
            algorithm(), **{**save, "save_folder": None}, lr=1e-2, load_path=str(tmp_path / "ep0-ba2-rank0.pt")
        )
        assert_equal(parameters(straight), parameters(resumed))
        assert metrics(straight, "let/loss")[2:] == metrics(resumed, "let/loss")

    def test_the_end_does_not_move_with_max_duration(self, train, teacher_folder, tmp_path):
        train(LET(teacher_folder, stop="0.5dur"), save_folder=str(tmp_path), save_interval="2ba", max_duration="8ba")
        algorithm = LET(teacher_folder, stop="0.5dur")
        resumed = train(algorithm, load_path=str(tmp_path / "ep0-ba2-rank0.pt"), max_duration="16ba", fit=False)
        assert algorithm._end == Time.from_timestring("4ba")
        resumed.close()

    def test_a_changed_stop_counts_and_is_reported(self, train, teacher_folder, tmp_path, caplog):
        train(LET(teacher_folder, stop="0.5dur"), save_folder=str(tmp_path), save_interval="2ba", max_duration="8ba")
        algorithm = LET(teacher_folder, stop="0.75dur", student_layer=2)
        train(algorithm, load_path=str(tmp_path / "ep0-ba2-rank0.pt"), max_duration="8ba", fit=False)
        assert algorithm._end == Time.from_timestring("6ba")
        assert "made with stop: '0.5dur', this run goes on with '0.75dur'" in caplog.text
        assert "made with student_layer: 3, this run goes on with 2" in caplog.text

    def test_added_to_an_old_run(self, train, teacher_folder, tmp_path):
        train(save_folder=str(tmp_path), save_interval="2ba", max_duration="4ba")
        with pytest.warns(UserWarning, match="LET is not in the state_dict"):
            trainer = train(
                LET(teacher_folder, stop="4ba"), load_path=str(tmp_path / "ep0-ba2-rank0.pt"), max_duration="4ba"
            )
        assert metrics(trainer, "let/weight") == [0.05, 0.025, 0.0]


class TestRetirement:
    """Invariant 6: after the end nothing is left."""

    @pytest.mark.parametrize("stop", ["3ba", "0.5dur", f"{3 * 8 * LENGTH}tok", "24sp"])
    def test_teacher_and_hook_are_gone(self, train, teacher_folder, stop, monkeypatch):
        calls = []
        run = Teacher._run
        monkeypatch.setattr(Teacher, "_run", lambda self, *args: calls.append(1) or run(self, *args))
        algorithm = LET(teacher_folder, stop=stop, weight=1.0)
        trainer = train(algorithm, fit=False)
        body = weakref.ref(algorithm._teacher.body)
        calls.clear()  # the check for causality
        trainer.fit()
        assert len(calls) == 3
        gc.collect()
        assert body() is None
        assert not trainer.state.model.model.transformer.blocks[2]._forward_hooks
        assert [event for event in Event if algorithm.match(event, trainer.state)] == [Event.INIT]
        assert metrics(trainer, "let/active") == [1, 1, 1, 0]
        assert metrics(trainer, "let/weight") == pytest.approx([1, 2 / 3, 1 / 3, 0])
        assert len(metrics(trainer, "let/loss")) == 3

    def test_once_and_with_the_step_and_the_memory(self, train, teacher_folder, caplog):
        caplog.set_level("INFO", "let_composer")
        trainer = train(LET(teacher_folder, stop="2ba"))
        messages = [r.getMessage() for r in caplog.records if "released" in r.getMessage()]
        size = sum(p.numel() for p in Teacher(teacher_folder).body.parameters()) * 4 / 2**20
        assert messages == [f"LET ended after batch 2: the teacher is released, {size:.1f} MiB of memory returned."]
        assert metrics(trainer, "let/memory_returned_mib") == [pytest.approx(size)]

    def test_a_second_fit_goes_on_where_the_first_stopped(self, train, teacher_folder):
        algorithm = LET(teacher_folder, stop="4ba", weight=1.0)
        trainer = train(algorithm, max_duration="5ba", fit=False)
        trainer.fit(duration="2ba")
        teacher = algorithm._teacher
        trainer.fit(duration="1ba")
        assert algorithm._teacher is teacher
        trainer.fit(duration="2ba")
        assert metrics(trainer, "let/weight") == [1, 0.75, 0.5, 0.25, 0]

    def test_max_duration_given_to_fit(self, train, teacher_folder):
        trainer = train(LET(teacher_folder, stop="0.5dur"), max_duration=None, fit=False)
        trainer.fit(duration="4ba")
        assert metrics(trainer, "let/active") == [1, 1, 0]


class TestNumbers:
    """Invariants 7 and 8."""

    def test_an_all_masked_microbatch(self, train, tokenizer, teacher_folder):
        data = build_data(tokenizer)
        loader: Any = data.dataloader
        collate = loader.collate_fn

        def mask_first_rows(rows: list[Any]) -> Any:
            batch = collate(rows)
            batch["labels"][:2] = -100
            batch["loss_generating_tokens"][:2] = [0, 0]
            return batch

        loader = torch.utils.data.DataLoader(loader.dataset, batch_size=8, collate_fn=mask_first_rows)
        data = DataSpec(loader, get_num_tokens_in_batch=data.get_num_tokens_in_batch)
        trainer = train(LET(teacher_folder, stop="3ba", weight=1.0), data=data, device_train_microbatch_size=2)
        assert all(torch.isfinite(p).all() for p in trainer.state.model.parameters())
        assert all(-1 <= value <= 1 for value in metrics(trainer, "let/loss"))

    def test_a_non_finite_teacher_does_not_reach_the_student(self, train, teacher_folder, monkeypatch):
        hidden = Teacher.hidden

        def poisoned(self: Teacher, *args: Any) -> torch.Tensor:
            states = hidden(self, *args).clone()
            states[0, 0], states[0, 1, 3] = float("inf"), float("nan")
            return states

        monkeypatch.setattr(Teacher, "hidden", poisoned)
        trainer = train(LET(teacher_folder, stop="6ba", weight=1.0, normalize_teacher="standardize"))
        assert all(torch.isfinite(p).all() for p in trainer.state.model.parameters())
        assert all(-1 < value < 1 for value in metrics(trainer, "let/loss"))

    def test_a_student_equal_to_its_teacher(self, train, tokenizer, teacher_folder):
        def run(*algorithms: Any):
            model = hf_student(tokenizer, teacher_folder)
            return train(*algorithms, model=model, max_duration="1ba")

        guided = run(LET(teacher_folder, student_layer=1, teacher_layer=1, stop="1ba", weight=1.0))
        assert metrics(guided, "let/loss") == [pytest.approx(-1)]
        plain = parameters(run())
        for name, value in parameters(guided).items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-7)


def hf_student(tokenizer: Any, folder: str, **options: Any) -> ComposerHFCausalLM:
    return ComposerHFCausalLM(
        tokenizer=tokenizer, pretrained_model_name_or_path=folder, pretrained=True, use_train_metrics=False, **options
    )


def evaluator(tokenizer: Any) -> Evaluator:
    return Evaluator(label="eval", dataloader=build_data(tokenizer, seed=4), metric_names=["LanguageCrossEntropy"])


class Tried(Callback):
    """How many of the hidden states and terms seen so far are still in memory whenever a batch is tried."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref] = []
        self.left: list[int] = []

    def saw(self, hidden: torch.Tensor) -> None:
        self.seen.append(weakref.ref(hidden))

    def after_forward(self, state: Any, logger: Any) -> None:
        self.saw(state.algorithms[0]._term)

    def before_train_batch(self, state: Any, logger: Any) -> None:
        self.left.append(sum(hidden() is not None for hidden in self.seen))


class TestCompany:
    """Models, losses, algorithms and callbacks that users have."""

    @pytest.mark.parametrize("return_dict", [True, False])  # without, Composer gets the loss as a tuple
    def test_a_hugging_face_student(self, train, tokenizer, teacher_folder, return_dict):
        model = hf_student(tokenizer, teacher_folder, config_overrides={"return_dict": return_dict})
        trainer = train(LET(teacher_folder, student_layer=1, stop="4ba"), model=model)
        assert len(metrics(trainer, "let/loss")) == 4

    @pytest.mark.parametrize(
        "loss",
        [
            torch.tensor(2.0),
            torch.tensor([2.0]),
            (torch.tensor(1.5), torch.tensor(0.5)),
            [torch.tensor(2.0)],
            {"total": torch.tensor(2.0), "loss": torch.tensor(1.9), "lbl": torch.tensor(0.1)},
            {"loss": torch.tensor(1.9), "lbl": torch.tensor(0.1)},
        ],
    )
    def test_the_loss_keeps_its_type(self, loss):
        result = plus(loss, torch.tensor(0.5))
        assert type(result) is type(loss)
        assert float(total(loss)) == pytest.approx(2.0)
        assert float(total(result)) == pytest.approx(2.5)
        if isinstance(loss, dict):
            assert {**loss, "total": result["total"]} == result

    def test_a_mixture_of_experts_loss(self, train, tokenizer, teacher_folder):
        model = build_student(tokenizer)
        plain_loss = model.loss

        def loss(outputs: Any, batch: Any) -> dict[str, torch.Tensor]:  # the form of llm-foundry's MoE
            lm = plain_loss(outputs, batch)
            balance = 0.01 * outputs.logits.square().mean()
            return {"total": lm + balance, "loss": lm, "lbl": balance}

        model.loss = loss
        trainer = train(LET(teacher_folder, stop="4ba", weight=1.0), model=model)
        total, lm = metrics(trainer, "loss/train/total")[0], metrics(trainer, "let/lm_loss")[0]
        assert lm == pytest.approx(metrics(trainer, "loss/train/loss")[0] + metrics(trainer, "loss/train/lbl")[0])
        assert total == pytest.approx(lm + metrics(trainer, "let/loss")[0])

    @pytest.mark.filterwarnings("ignore:KillLossSpike is experimental")
    def test_clipping_ema_loss_spikes_and_evaluation(self, train, tokenizer, teacher_folder):
        algorithms = (
            GradientClipping(clipping_type="norm", clipping_threshold=1.0),
            EMA(half_life="2ba"),
            LET(teacher_folder, stop="4ba"),
        )
        options = {"eval_dataloader": evaluator(tokenizer), "eval_interval": "2ba"}
        trainer = train(*algorithms, callbacks=[KillLossSpike(window_size=2)], **options, fit=False)
        trainer.eval()  # as eval_first does
        assert algorithms[2]._capture.hidden is None
        trainer.fit()
        assert metrics(trainer, "let/active") == [1, 1, 1, 1, 0]
        assert len(metrics(trainer, "metrics/eval/LanguageCrossEntropy")) >= 3

    def test_generation_between_batches(self, train, tokenizer, teacher_folder):
        trainer = train(LET(teacher_folder, stop="4ba"), max_duration="4ba", fit=False)
        trainer.fit(duration="2ba")
        trainer.state.model.eval()
        ids = torch.ones(1, 3, dtype=torch.long)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "pad_token_id": 0}
        assert trainer.state.model.model.generate(ids, **options).shape[1] >= 4
        trainer.fit(duration="2ba")
        assert len(metrics(trainer, "let/loss")) == 4

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # the compiler's own
    def test_a_compiled_student(self, train, tokenizer, teacher_folder):
        torch._dynamo.reset()
        options = {"eval_dataloader": evaluator(tokenizer), "eval_interval": "2ba"}
        plain = train(LET(teacher_folder, stop="4ba", weight=1.0), **options)
        with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4, fail_on_recompile_limit_hit=True):
            compiled = train(
                LET(teacher_folder, stop="4ba", weight=1.0), **options, compile_config={"backend": "aot_eager"}
            )
        assert metrics(plain, "let/loss") == pytest.approx(metrics(compiled, "let/loss"), rel=1e-4)
        assert metrics(plain, "loss/train/total") == pytest.approx(metrics(compiled, "loss/train/total"), rel=1e-5)

    @pytest.mark.filterwarnings("ignore:Specifying the ProgressBarLogger via `loggers`")
    def test_losses_reach_the_progress_bar(self, train, teacher_folder):
        shown: dict[str, Any] = {}
        bar = ProgressBarLogger()
        bar.log_to_pbar = lambda data: shown.update(data)  # what it would write behind the bar
        train(LET(teacher_folder, stop="4ba"), loggers=[bar])
        assert {"let/loss", "let/lm_loss"} <= shown.keys()

    @pytest.mark.parametrize("place", ["student", "teacher", "term", "loss"])
    @pytest.mark.filterwarnings("ignore:CUDA out of memory or excessive memory allocation")  # what is provoked here
    def test_a_retry_after_running_out_of_memory(self, train, tokenizer, teacher_folder, monkeypatch, place):
        """Composer runs the same batch again, in smaller microbatches; what the first try left must not count, nor
        take up memory."""

        def run(fails: bool) -> tuple[Any, LET]:
            calls: list[int] = []
            tried = Tried()

            def failing(function: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    calls.append(1)
                    if fails and len(calls) == 4:  # the second microbatch of the second batch
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    return function(*args, **kwargs)

                return call

            model = build_student(tokenizer)
            blocks = model.model.transformer.blocks
            blocks[2].register_forward_hook(lambda _, args, output: tried.saw(output[0]))
            algorithm = LET(teacher_folder, stop="4ba", weight=1.0, normalize_teacher="standardize")
            trainer = train(
                algorithm,
                model=model,
                device_train_microbatch_size=4,
                max_duration="4ba",
                callbacks=[tried],
                fit=False,
            )
            trainer.state.auto_microbatching = True  # Composer offers it on CUDA only
            if place == "student":
                blocks[3].forward = failing(blocks[3].forward)  # behind what is captured
            elif place == "teacher":
                algorithm._teacher.hidden = failing(algorithm._teacher.hidden)
            elif place == "term":
                monkeypatch.setattr("let_composer.algorithm.alignment_loss", failing(alignment_loss))
            else:
                model.loss = failing(model.loss)  # when the term is there already
            trainer.fit()
            assert tried.left == [0] * (5 if fails else 4)
            return trainer, algorithm

        (whole, first), (retried, second) = run(False), run(True)
        assert retried.state.device_train_microbatch_size == 2
        assert_close(parameters(whole), parameters(retried))
        for name in ("let/loss", "let/lm_loss", "let/constant_cosine"):
            assert metrics(whole, name) == pytest.approx(metrics(retried, name), rel=1e-5)
        moments = [torch.tensor(a.state_dict()["statistics"]["moments"]) for a in (first, second)]
        torch.testing.assert_close(*moments)

    def test_frozen_blocks_are_refused(self, train, tokenizer, teacher_folder):
        model = build_student(tokenizer)
        for module in (model.model.transformer.wte, model.model.transformer.wpe, *model.model.transformer.blocks[:3]):
            module.requires_grad_(False)
        with pytest.raises(RuntimeError, match="student_layer 3 to carry a gradient"):
            train(LET(teacher_folder, stop="4ba"), model=model)

    def test_checkpointing_of_the_models_own(self, train, tokenizer, teacher_folder):
        def run(**options: Any) -> Any:
            model = hf_student(tokenizer, teacher_folder)
            if options:
                model.model.gradient_checkpointing_enable(options)
            return train(LET(teacher_folder, student_layer=1, stop="2ba", weight=1.0), model=model, max_duration="2ba")

        plain = parameters(run())
        for reentrant in (True, False):
            trainer = run(use_reentrant=reentrant)
            assert trainer.state.model.model.is_gradient_checkpointing
            assert_close(plain, parameters(trainer))

    def test_throughput_with_the_teacher(self, train, tokenizer, teacher_folder):
        monitor = SpeedMonitor(window_size=2, gpu_flops_available=10**9)
        algorithm = LET(teacher_folder, stop="5ba")
        trainer = train(algorithm, callbacks=[monitor], max_duration="7ba", fit=False)
        flops = algorithm._teacher.flops(8 * LENGTH, LENGTH)
        share = flops / trainer.state.model.flops_per_batch({"input_ids": torch.zeros(8, LENGTH)})
        trainer.fit()
        logger = trainer.logger.destinations[0]
        for name in ("flops_per_sec", "mfu"):
            plain = {time.batch: value for time, value in logger.data[f"throughput/device/{name}"]}
            found = {time.batch: value for time, value in logger.data[f"let/throughput/device/{name}"]}
            assert list(plain) == [3, 4, 5, 6, 7] and list(found) == [3, 4]
            for batch, value in found.items():
                assert value == pytest.approx(plain[batch] * (1 + share)), name

    def test_one_instance_in_two_trainers(self, train, teacher_folder):
        algorithm = LET(teacher_folder, stop="0.5dur", weight=1.0)
        first, second = train(algorithm, max_duration="4ba"), train(algorithm, max_duration="6ba")
        assert metrics(first, "let/active") == [1, 1, 0]
        assert metrics(second, "let/active") == [1, 1, 1, 0]

    def test_layers_and_resizing(self, train, teacher_folder):
        losses = [
            metrics(train(LET(teacher_folder, stop="2ba", **options)), "let/loss")[0]
            for options in (
                {},
                {"resize": "teacher"},
                {"student_layer": -1},
                {"student_layer": "model.transformer.blocks.1"},
                {"teacher_layer": 1},
            )
        ]
        assert len(set(losses)) == len(losses)


class TestBadInput:
    """Every message says what was expected, what came and what to do."""

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"wieght": 0.1}, TypeError, "no option 'wieght' .did you mean 'weight'"),
            ({"lambda": 0.1}, TypeError, "no option 'lambda'"),
            ({"weight": -0.1}, ValueError, "weight must be finite and not negative, got -0.1"),
            ({"weight": float("nan")}, ValueError, "got nan"),
            ({"weight": float("inf")}, ValueError, "got inf"),
            ({"weight": "0.1"}, TypeError, "weight must be a number, got '0.1' .str"),
            ({"weight": True}, TypeError, "weight must be a number, got True"),
            ({"teacher": 3}, TypeError, "teacher must be a hub id or a path"),
            ({"student_layer": 0}, ValueError, "count the blocks passed, from 1"),
            ({"student_layer": 2.5}, TypeError, "student_layer must be a number of blocks or a dotted path"),
            ({"teacher_layer": "last"}, TypeError, "teacher_layer must be a number of blocks"),
            ({"stop": "soon"}, ValueError, "stop must be a time string"),
            ({"anneal": "step"}, ValueError, "anneal must be one of linear, cosine, constant, got 'step'"),
            ({"resize": "both"}, ValueError, "resize must be one of teacher, student"),
            ({"normalize_teacher": True}, ValueError, "normalize_teacher must be one of none, center, standardize"),
            ({"placement": "cpu"}, ValueError, "placement must be one of replicate, shard"),
            ({"implementation": "cuda"}, ValueError, "implementation must be one of auto, triton, torch"),
            ({"trust_remote_code": "no"}, TypeError, "trust_remote_code must be true or false"),
        ],
    )
    def test_in_the_constructor(self, options, error, message):
        with pytest.raises(error, match=message):
            LET(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"teacher": "./nowhere"}, "there is no teacher at './nowhere'"),
            ({"student_layer": 31}, "has 4 blocks. Got 31"),
            ({"teacher_layer": 9}, "has 2 blocks. Got 9"),
            ({"stop": "7ba"}, "past the end of training"),
            ({"placement": "shard"}, "needs at least two ranks"),
            ({"implementation": "triton"}, "implementation"),
        ],
    )
    def test_before_training_starts(self, train, teacher_folder, options, message):
        with pytest.raises(ValueError, match=message):
            train(LET(**{"teacher": teacher_folder, **options}), fit=False)

    def test_another_vocabulary(self, train, tokenizer, teacher_folder, tmp_path):
        import json

        LlamaForCausalLM.from_pretrained(teacher_folder).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="2 of 64 token ids differ .3 is 'w3' here and 'w4' there"):
            train(LET(str(tmp_path)), fit=False)

    def test_a_student_on_the_meta_device_without_fsdp(self, train, tokenizer, teacher_folder):
        model = build_student(tokenizer).to("meta")
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # by Composer, before LET
            train(LET(teacher_folder), model=model, fit=False)

    def test_an_epoch_without_a_length(self, train, tokenizer, teacher_folder):
        class Endless(torch.utils.data.IterableDataset):
            def __iter__(self):
                while True:
                    yield {"input_ids": [1] * LENGTH}

        finite = build_data(tokenizer)
        loader = torch.utils.data.DataLoader(Endless(), batch_size=8, collate_fn=finite.dataloader.collate_fn)
        data = DataSpec(loader, get_num_tokens_in_batch=finite.get_num_tokens_in_batch)
        with pytest.raises(ValueError, match="stop is 1ep, but the training data loader has no length"):
            train(LET(teacher_folder, stop="1ep"), data=data, fit=False)


def test_every_guided_event_is_handled_and_matching_changes_nothing(train, teacher_folder):
    algorithm = LET(teacher_folder, stop="4ba")
    trainer = train(algorithm, fit=False)
    before = dict(vars(algorithm))
    assert {event for event in Event if algorithm.match(event, trainer.state)} == _GUIDED
    assert vars(algorithm) == before
    assert repr(algorithm) == repr(LET(teacher_folder, stop="4ba"))
