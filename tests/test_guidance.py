"""A guided batch in a real Trainer: separation, accumulation, numbers, and the company that users have."""

import functools
import sys
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from composer import Callback, DataSpec
from composer.algorithms import EMA, GradientClipping
from composer.core import Event
from conftest import (
    LENGTH,
    VOCABULARY,
    Reads,
    assert_close,
    build_data,
    build_student,
    counted,
    evaluator,
    hf_student,
    metrics,
    parameters,
)
from llmfoundry.callbacks.kill_loss_spike_callback import KillLossSpike
from transformers import GPT2Config, GPT2LMHeadModel

from let_composer import LET, RKD, SALT, alignment_loss
from let_composer.teacher import Teacher


def test_the_teacher_is_nobodys_parameter(train, let):
    """Invariant 2: neither in the checkpoint, nor in the export, nor in the optimizer."""
    plain = train(max_duration="1ba")
    guided = train(let(stop="4ba"), max_duration="4ba", fit=False)
    guided.fit(duration="1ba")
    assert guided.state.algorithms[0]._teacher is not None
    assert plain.state.state_dict()["model"].keys() == guided.state.state_dict()["model"].keys()
    count = [sum(p.numel() for g in t.state.optimizers[0].param_groups for p in g["params"]) for t in (plain, guided)]
    assert count[0] == count[1]


class TestAccumulation:
    """Invariant 3: how a batch is cut into microbatches does not matter."""

    @pytest.mark.parametrize(
        ("on_tokens", "ragged", "method", "options"),
        [  # by samples Composer weights unequal microbatches otherwise, the student's loss too
            (True, False, LET, {"normalize_teacher": "standardize"}),
            (True, True, LET, {}),
            (True, True, LET, {"normalize_teacher": "standardize"}),
            (False, False, LET, {"normalize_teacher": "standardize"}),
            (True, True, RKD, {}),
            *((True, True, method, {"weight": "auto"}) for method in (LET, RKD, SALT)),
        ],
    )
    def test_microbatches(self, train, tokenizer, teacher_folder, on_tokens, ragged, method, options):
        def run(size: int):
            return train(
                method(teacher_folder, **{"stop": "3ba", "weight": 1.0, **options}),
                data=build_data(tokenizer, ragged=ragged),
                device_train_microbatch_size=size,
                accumulate_train_batch_on_tokens=on_tokens,
                max_duration="3ba",
            )

        whole, parts = run(8), run(3)
        assert_close(parameters(whole), parameters(parts))
        logged = [name for name in whole.logger.destinations[0].data if name.startswith(method.prefix)]
        assert len(logged) > 6
        for name in logged:
            expected = pytest.approx(metrics(parts, name), rel=1e-4 if "weight" in options else 1e-5)
            assert metrics(whole, name) == expected, name

    @pytest.mark.parametrize("needed", [False, True])
    def test_the_teacher_sees_padding_only_where_it_matters(
        self, train, tokenizer, let, teacher_sees, monkeypatch, needed
    ):
        if needed:  # as with padding in front, which MPT cannot train on
            monkeypatch.setattr("let_composer.guidance.needs_mask", lambda mask: True)
        data = build_data(tokenizer, ragged=True)
        trainer = train(let(stop="2ba"), data=data, device_train_microbatch_size=4, fit=False)
        given = teacher_sees()
        trainer.fit()
        assert given == [(needed, False)] * 4

    @pytest.mark.parametrize(("layer", "place"), [(3, 3), ("model.transformer.blocks.1", 2)])
    @pytest.mark.parametrize(("teacher_layer", "resize"), [(-1, "student"), (1, "teacher")])
    def test_weighted_by_samples_as_composer_weights_the_students_loss(
        self, train, tokenizer, let, teacher_folder, layer, place, teacher_layer, resize
    ):
        data = build_data(tokenizer, ragged=True)
        batch = next(iter(data.dataloader))
        options = {"device_train_microbatch_size": 2, "accumulate_train_batch_on_tokens": False}
        algorithm = let(stop="1ba", weight=0.5, student_layer=layer, teacher_layer=teacher_layer, resize=resize)
        guided = train(algorithm, data=data, **options, max_duration="1ba", lr=1.0)
        model, teacher = build_student(tokenizer), Teacher(teacher_folder, layer=teacher_layer)
        for rows in torch.arange(8).split(2):
            part = {key: batch[key][rows] for key in ("input_ids", "labels", "attention_mask")}
            ids, mask = part["input_ids"], part["attention_mask"]
            outputs = model.model(ids, attention_mask=mask, output_hidden_states=True)
            states = outputs.hidden_states[place], teacher.hidden(ids, mask)
            term = alignment_loss(*states, counted(part), resize=resize)
            (0.25 * (model.loss(outputs, part) + 0.5 * term)).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        assert_close({name: p.detach() for name, p in model.named_parameters()}, parameters(guided))


class TestNumbers:
    """Invariants 7 and 8, and what is left out is counted."""

    def test_rows_without_a_direction_are_kept_out_counted_and_reported_once(
        self, train, tokenizer, let, teacher_sees, caplog
    ):
        def mask_a_microbatch(batch: Any) -> Any:
            batch["labels"][:3] = -100
            batch["loss_generating_tokens"][:3] = [0] * 3
            return batch

        def spoil(states: torch.Tensor) -> None:
            states[:, : LENGTH // 2 - 1] = float("nan")
            states[:, LENGTH // 2 - 1, 3] = float("inf")

        algorithm = let(stop="3ba", normalize_teacher="standardize")
        data = build_data(tokenizer, change=mask_a_microbatch)
        trainer = train(algorithm, data=data, device_train_microbatch_size=3, fit=False)
        teacher_sees(spoil)
        trainer.fit()
        assert all(torch.isfinite(p).all() for p in trainer.state.model.parameters())
        assert all(-1 < value < 1 for value in metrics(trainer, "let/loss"))
        assert metrics(trainer, "let/usable") == pytest.approx([(LENGTH / 2 - 1) / (LENGTH - 1)] * 3)
        assert caplog.text.count("let/usable is 0.47") == 1

    def test_a_student_equal_to_its_teacher(self, train, tokenizer, let, teacher_folder):
        same = let(student_layer=1, teacher_layer=1, stop="1ba")
        plain, guided = (
            train(*algorithms, model=hf_student(tokenizer, teacher_folder), max_duration="1ba")
            for algorithms in ((), (same,))
        )
        assert metrics(guided, "let/loss") == [-metrics(guided, "let/cosine")[0]] == [pytest.approx(-1)]
        for name, value in parameters(plain).items():
            torch.testing.assert_close(parameters(guided)[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", [LET, RKD])
def test_the_host_waits_for_nothing_before_the_end_of_a_batch(train, teacher_folder, method):
    found: dict[Event, Counter[str]] = {}

    class Watched(method):
        def apply(self, event: Event, *args: Any) -> None:
            with Reads() as reads:
                super().apply(event, *args)
            found[event] = found.get(event, Counter()) + reads.found

    options = {"normalize_teacher": "standardize"} if method is LET else {}
    train(Watched(teacher_folder, stop="3ba", weight="auto", **options))
    assert found.pop(Event.BATCH_END)
    batch = {Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_LOSS}
    assert not any(found.pop(event) for event in batch)


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

    @pytest.mark.parametrize("method", [LET, RKD])
    @pytest.mark.parametrize("kind", ["plain", "balanced", "tuples"])
    def test_what_is_logged_is_what_is_trained_on(self, train, tokenizer, teacher_folder, method, kind):
        """RKD takes its weight from the cross-entropy, LET from nothing; neither touches a balancing loss."""
        model = build_student(tokenizer)
        if kind == "balanced":  # as llm-foundry's mixtures of experts

            def balanced(outputs: Any, batch: Any, plain: Any = model.loss) -> dict[str, torch.Tensor]:
                lm, balance = plain(outputs, batch), 0.01 * outputs.logits.square().mean()
                return {"total": lm + balance, "loss": lm, "lbl": balance}

            model.loss = balanced
        elif kind == "tuples":  # an equal of the teacher, from which Composer gets the loss as a tuple
            model = hf_student(tokenizer, teacher_folder, config_overrides={"return_dict": False})
        layer = {"student_layer": 1} if method is LET else {}
        data = build_data(tokenizer, ragged=True)
        algorithm = method(teacher_folder, weight=0.7, stop="6ba", **layer)
        trainer = train(algorithm, model=model, data=data, device_train_microbatch_size=3)
        logged = (metrics(trainer, f"{method.prefix}/{name}") for name in ("lm_loss", "loss", "weight"))
        balances = metrics(trainer, "loss/train/lbl") if kind == "balanced" else [0] * 6
        expected = [
            lm + weight * (term - (float(lm - balance) if method is RKD else 0))
            for lm, term, weight, balance in zip(*logged, balances, strict=False)
        ]
        assert metrics(trainer, "loss/train/total") == pytest.approx(expected, rel=1e-5)
        assert all(0 < share < 1 for share in metrics(trainer, f"{method.prefix}/teacher_flops_share"))
        if kind == "tuples" and method is RKD:
            assert metrics(trainer, "kd/loss")[0] == pytest.approx(0, abs=1e-5)

    @pytest.mark.filterwarnings("ignore:KillLossSpike is experimental")
    def test_clipping_ema_loss_spikes_and_evaluation(self, train, tokenizer, let):
        others = GradientClipping(clipping_type="norm", clipping_threshold=1.0), EMA(half_life="2ba")
        options = {"eval_dataloader": evaluator(tokenizer), "eval_interval": "2ba"}
        guidance, spikes = let(stop="4ba"), KillLossSpike(window_size=2)
        trainer = train(*others, guidance, callbacks=[spikes], **options, fit=False)
        trainer.eval()  # as eval_first does
        assert guidance._capture.hidden is None
        trainer.fit()
        assert metrics(trainer, "let/active") == [1, 1, 1, 1, 0]
        assert len(metrics(trainer, "metrics/eval/LanguageCrossEntropy")) >= 3

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # the compiler's own
    def test_a_compiled_student(self, train, tokenizer, let):
        torch._dynamo.reset()
        options = {"eval_dataloader": evaluator(tokenizer), "eval_interval": "2ba"}
        plain = train(let(stop="4ba"), **options)
        with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4, fail_on_recompile_limit_hit=True):
            compiled = train(let(stop="4ba"), **options, compile_config={"backend": "aot_eager"})
        assert metrics(plain, "let/loss") == pytest.approx(metrics(compiled, "let/loss"), rel=1e-4)
        assert metrics(plain, "loss/train/total") == pytest.approx(metrics(compiled, "loss/train/total"), rel=1e-5)

    @pytest.mark.parametrize("place", ["student", "teacher", "term", "loss"])
    @pytest.mark.filterwarnings("ignore:CUDA out of memory or excessive memory allocation")  # what is provoked here
    def test_a_retry_after_running_out_of_memory(self, train, tokenizer, let, monkeypatch, place):
        """Composer runs the same batch again, in smaller microbatches; what the first try left must not count, nor
        take up memory."""

        def run(fails: bool) -> tuple[Any, LET]:
            calls: list[int] = []
            tried = Tried()

            def failing(*args: Any, function: Any, **kwargs: Any) -> Any:
                calls.append(1)
                if fails and len(calls) == 4:  # the second microbatch of the second batch
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return function(*args, **kwargs)

            model = build_student(tokenizer)
            blocks = model.model.transformer.blocks
            blocks[2].register_forward_hook(lambda _, args, output: tried.saw(output[0]))
            algorithm = let(stop="4ba", normalize_teacher="standardize")
            options = {"device_train_microbatch_size": 4, "max_duration": "4ba", "callbacks": [tried]}
            trainer = train(algorithm, model=model, **options, fit=False)
            trainer.state.auto_microbatching = True  # Composer offers it on CUDA only
            owner, name = {
                "student": (blocks[3], "forward"),  # behind what is captured
                "teacher": (algorithm._teacher, "hidden"),
                "term": (sys.modules[LET.__module__], "alignment"),
                "loss": (model, "loss"),  # when the term is there already
            }[place]
            monkeypatch.setattr(owner, name, functools.partial(failing, function=getattr(owner, name)))
            trainer.fit()
            assert tried.left == [0] * (5 if fails else 4)
            return trainer, algorithm

        (whole, first), (retried, second) = run(False), run(True)
        assert retried.state.device_train_microbatch_size == 2
        assert_close(parameters(whole), parameters(retried))
        for name in ("let/loss", "let/lm_loss", "let/constant_cosine", "let/gradient_ratio"):
            assert metrics(whole, name) == pytest.approx(metrics(retried, name), rel=1e-5)
        moments = [torch.tensor(a.state_dict()["saved"]["statistics"]["moments"]) for a in (first, second)]
        torch.testing.assert_close(*moments)

    def test_checkpointing_of_the_models_own(self, train, tokenizer, let, teacher_folder):
        def run(**options: Any) -> Any:
            model = hf_student(tokenizer, teacher_folder)
            if options:
                model.model.gradient_checkpointing_enable(options)
            return train(let(student_layer=1, stop="2ba"), model=model, max_duration="2ba")

        plain = parameters(run())
        for reentrant in (True, False):
            trainer = run(use_reentrant=reentrant)
            assert trainer.state.model.model.is_gradient_checkpointing
            assert_close(plain, parameters(trainer))

    def test_metrics_come_under_the_step_that_the_clock_shows(self, train, let):
        """Some services drop what goes back, and Composer's monitors log under the new step at the end of a batch."""
        data = train(let(stop="4ba")).logger.destinations[0].data
        for name in ("let/loss", "let/lm_loss", "let/cosine", "let/constant_cosine", "let/usable"):
            assert [time.batch for time, _ in data[name]] == [1, 2, 3, 4], name


class TestTwoMethods:
    """LET and RKD guide one run."""

    def test_two_lets_are_refused(self, train, let):
        with pytest.raises(ValueError, match=r"one algorithm that logs under let/, got LET\(.*'7ba'.* and 1 more\."):
            train(RKD("./nowhere"), let(stop="7ba"), let(student_layer=1), fit=False)

    def test_their_order_does_not_matter_and_one_teacher_serves_both(self, train, teacher_folder, teacher_sees):
        def run(first: type, second: type) -> Any:
            options = {LET: {"weight": 0.7, "stop": "2ba"}, RKD: {"weight": 0.3, "stop": "3ba"}}
            algorithms = [method(teacher_folder, **options[method]) for method in (first, second)]
            trainer = train(*algorithms, max_duration="4ba", device_train_microbatch_size=4, fit=False)
            assert algorithms[0]._teacher is algorithms[1]._teacher
            given = teacher_sees()
            trainer.fit()
            assert len(given) == 3 * 2  # batches that either guides, in two microbatches
            assert all(algorithm._teacher is None for algorithm in algorithms)
            return trainer

        one, other = run(LET, RKD), run(RKD, LET)
        assert_close(parameters(one), parameters(other))
        lm, let, kd = (metrics(one, name)[0] for name in ("let/lm_loss", "let/loss", "kd/loss"))
        assert metrics(one, "loss/train/total")[0] == pytest.approx(0.7 * lm + 0.7 * let + 0.3 * kd, rel=1e-5)
        assert metrics(one, "kd/lm_loss")[0] == lm
        assert [metrics(one, f"{name}/memory_returned_mib")[0] > 0 for name in ("let", "kd")] == [False, True]


class TestBatches:
    """What a batch must be, and what is done with its keys."""

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (lambda batch: {"input_ids": batch["input_ids"]}, "Got input_ids"),
            (lambda batch: [batch["input_ids"], batch["labels"]], "Got a list"),
            (lambda batch: (batch["input_ids"], batch["labels"]), "Got a "),
        ],
    )
    def test_others_die_before_the_first_step(self, train, tokenizer, let, change, found):
        loader: Any = build_data(tokenizer, change=change).dataloader
        data = DataSpec(loader, get_num_samples_in_batch=lambda batch: 8, get_num_tokens_in_batch=lambda batch: 8)
        with pytest.raises(ValueError, match=f"LET needs batches that map 'input_ids' and 'labels'.*{found}"):
            train(let(stop="2ba"), data=data, accumulate_train_batch_on_tokens=False)

    @pytest.mark.parametrize("separate", [True, False])
    @pytest.mark.filterwarnings("ignore:MPT received non-None input for `sequence_id`")  # where it does not separate
    def test_packed_documents_are_apart_where_they_are_for_the_student(
        self, train, tokenizer, let, teacher_sees, separate
    ):
        def pack(batch: Any) -> Any:
            return {**batch, "sequence_id": (torch.arange(LENGTH) >= 5).long().expand(8, LENGTH)}

        model = build_student(tokenizer, attn_config={"attn_impl": "torch", "attn_uses_sequence_id": separate})
        trainer = train(let(stop="1ba"), data=build_data(tokenizer, change=pack), model=model, fit=False)
        given = teacher_sees()
        trainer.fit()
        assert given == [(False, separate)]

    def test_a_teacher_that_cannot_keep_them_apart_is_refused_before_the_first_batch(
        self, train, tokenizer, let, tmp_path
    ):
        config = GPT2Config(VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=1)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model = build_student(tokenizer, attn_config={"attn_impl": "torch", "attn_uses_sequence_id": True})
        with pytest.raises(ValueError, match=f"cannot separate the documents of a packed row of {LENGTH} tokens"):
            train(let(teacher=str(tmp_path)), model=model, fit=False)
