"""From waiting to the end: off, resumption, retirement, a clock that goes back, closing, bad input."""

import copy
import gc
import json
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.core import Event, Time
from conftest import LENGTH, assert_equal, build_data, build_student, copy_teacher, evaluator, metrics, parameters

from let_composer import LET, RKD, SALT


def hooks(trainer: Trainer) -> Any:
    return trainer.state.model.model.transformer.blocks[2]._forward_hooks


class TestOff:
    """Invariant 1: weight 0 and a finished schedule are bit-identical to a run without LET."""

    @pytest.mark.parametrize("method", [LET, SALT])
    def test_weight_zero(self, train, tokenizer, method, caplog):
        def run(*algorithms: Any) -> tuple[Any, torch.Tensor]:
            trainer = train(*algorithms, model=build_student(tokenizer, resid_pdrop=0.1))
            return trainer, torch.get_rng_state()

        (plain, state), (off, state_off) = run(), run(method(teacher="./nowhere", weight=0))
        assert_equal(parameters(plain), parameters(off))
        assert torch.equal(state, state_off)
        assert metrics(plain, "loss/train/total") == metrics(off, "loss/train/total")
        assert not any(name.startswith(f"{method.prefix}/") for name in off.logger.destinations[0].data)
        assert f"{method.__name__} has weight 0: the run is not guided" in caplog.text

    def test_a_resume_after_the_end_loads_no_teacher_and_is_a_plain_run(self, train, let, saved, caplog):
        load = saved(let(stop="2ba"), max_duration="2ba")
        plain = train(**load)
        resumed = train(moved := let(teacher="./nowhere", stop="2ba"), **load)
        assert_equal(parameters(plain), parameters(resumed))
        assert not moved.guiding and caplog.text.count("LET ended at 2ba: the teacher is not loaded.") == 1


class TestResume:
    """Invariant 4: stopping and resuming equals never having stopped."""

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            (LET, {"stop": "5ba", "weight": 1.0}),
            (LET, {"normalize_teacher": "standardize", "stop": "0.6dur", "anneal": "cosine"}),
            (RKD, {"stop": "5ba"}),
            (SALT, {}),
        ],
    )
    def test_bitwise(self, train, teacher_folder, saved, method, options):
        run = {"max_duration": "8ba", "optimizer": torch.optim.AdamW, "lr": 1e-2}
        first, part, second = (method(teacher_folder, **options) for _ in range(3))
        straight = train(first, **run)
        resumed = train(second, **run, **saved(part, **run))
        assert_equal(parameters(straight), parameters(resumed))
        assert first.state_dict() == json.loads(json.dumps(second.state_dict()))  # plain values
        for name in (f"{method.prefix}/loss", f"{method.prefix}/weight"):
            assert metrics(straight, name)[2:] == metrics(resumed, name)

    @pytest.mark.parametrize("weight", [0.1, "auto"])
    def test_the_end_stays_and_other_settings_count_and_are_reported(self, train, let, saved, caplog, weight):
        load = saved(let(stop="0.5dur", weight=weight), max_duration="8ba")
        same = let(stop="0.5dur", weight=weight, implementation="torch")
        train(same, **load, max_duration="16ba", fit=False)
        assert same.schedule.end == Time.from_timestring("4ba")
        assert "made with" not in caplog.text
        others = {
            "stop": "0.75dur",
            "student_layer": 2,
            "weight": "auto" if weight == 0.1 else 0.3,
            "anneal": "cosine",
            "resize": "teacher",
            "normalize_teacher": "center",
        }
        train(other := let(**others), **load, max_duration="8ba", fit=False)
        assert other.schedule.end == Time.from_timestring("6ba")
        for key, value in others.items():
            theirs = getattr(same, key)
            assert f"made with let.{key}: {theirs!r}, this run goes on with {value!r}." in caplog.text

    def test_statistics_belong_to_weights_not_to_a_name(self, train, let, saved, teacher_folder, tmp_path):
        def mean(folder: Any, **load: Any) -> Any:
            train(algorithm := let(teacher=str(folder), stop="4ba", normalize_teacher="center"), **load, fit=False)
            return algorithm.saved()["statistics"]["moments"]

        copy_teacher(teacher_folder, tmp_path / "copy")
        copy_teacher(teacher_folder, tmp_path / "other", lambda model: model.model.norm.weight.data[0].add_(1))
        load = saved(let(stop="4ba", normalize_teacher="center"), max_duration="4ba")
        assert mean(tmp_path / "copy", **load) is not None
        assert mean(tmp_path / "other", **load) is None


class TestRetirement:
    """Invariant 6: after the end nothing is left."""

    @pytest.mark.parametrize("stop", ["0.5dur", f"{3 * 8 * LENGTH}tok", "24sp"])
    def test_teacher_and_hook_are_gone_and_it_is_told_once(self, train, let, stop, teacher_sees, caplog):
        trainer = train(algorithm := let(stop=stop), fit=False)
        body = weakref.ref(algorithm._teacher.body)
        size = sum(p.numel() for p in algorithm._teacher.body.parameters()) * 4 / 2**20
        given = teacher_sees()
        trainer.fit()
        assert len(given) == 3
        gc.collect()
        assert body() is None and not hooks(trainer)
        matched = {event for event in Event if algorithm.match(event, trainer.state)}
        assert matched == {Event.INIT, Event.AFTER_LOAD, Event.FIT_START}
        assert metrics(trainer, "let/active") == [1, 1, 1, 0]
        assert metrics(trainer, "let/weight") == pytest.approx([1, 2 / 3, 1 / 3, 0])
        assert len(metrics(trainer, "let/loss")) == 3
        messages = [r.getMessage() for r in caplog.records if "released" in r.getMessage()]
        assert messages == [f"LET ended after batch 3: the teacher is released, {size:.1f} MiB of memory returned."]
        assert metrics(trainer, "let/memory_returned_mib") == [pytest.approx(size)]

    def test_a_second_fit_goes_on_where_the_first_stopped(self, train, let):
        trainer = train(algorithm := let(stop="4ba"), max_duration="5ba", fit=False)
        trainer.fit(duration="2ba")
        teacher = algorithm._teacher
        trainer.fit(duration="1ba")
        assert algorithm._teacher is teacher
        trainer.fit(duration="2ba")
        assert metrics(trainer, "let/weight") == [1, 0.75, 0.5, 0.25, 0]

    @pytest.mark.parametrize("given", [{}, {"train_dataloader": None}])
    def test_max_duration_and_data_given_to_fit(self, train, tokenizer, let, given, caplog):
        trainer = train(let(stop="0.5dur"), max_duration=None, **given, fit=False)
        trainer.fit(train_dataloader=build_data(tokenizer), duration="4ba")
        assert metrics(trainer, "let/active") == [1, 1, 0]
        assert "LET guides until 2ba" in caplog.text


class TestClock:
    """A clock that goes back starts the guidance anew; a run that is longer does not."""

    def test_a_second_fit_with_a_reset_clock(self, train, let):
        trainer = train(let(stop="0.5dur"), max_duration="4ba")
        trainer.fit(duration="8ba", reset_time=True)
        assert metrics(trainer, "let/weight") == [1, 0.5, 0, 1, 0.75, 0.5, 0.25, 0]

    def test_in_the_middle_of_the_guidance(self, train, let):
        trainer = train(algorithm := let(stop="4ba", normalize_teacher="center"), max_duration="2ba")
        trainer.fit(duration="2ba", reset_time=True)
        assert metrics(trainer, "let/weight") == [1, 0.75, 1, 0.75]
        assert algorithm.saved()["statistics"]["moments"][0][0] == 2 * 8 * (LENGTH - 1)

    @pytest.mark.parametrize("how", ["reset_time", "load_ignore_keys"])
    def test_a_finished_run_is_loaded_and_trained_anew(self, train, let, saved, how):
        load: dict[str, Any] = saved(let(stop="0.5dur"), max_duration="4ba", batch=4)
        if how == "load_ignore_keys":
            load["load_ignore_keys"] = ["state/timestamp"]
        trainer = train(let(stop="0.5dur"), max_duration="8ba", **load, fit=False)
        trainer.fit(**({"duration": "8ba", "reset_time": True} if how == "reset_time" else {}))
        assert metrics(trainer, "let/weight") == [1, 0.75, 0.5, 0.25, 0]


class Interrupt(Callback):
    """What Ctrl-C does, in the middle of the third batch."""

    def after_forward(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == 2:
            raise KeyboardInterrupt


class TestLettingGo:
    """A Trainer that is not trained, closed or interrupted; a model that is copied meanwhile."""

    def test_a_trainer_that_only_evaluates_needs_no_teacher(self, train, tokenizer, let):
        options = {"train_dataloader": None, "eval_dataloader": evaluator(tokenizer)}
        train(let(teacher="./nowhere"), **options, fit=False).eval()

    def test_interrupted_copied_and_closed(self, train, let):
        trainer = train(algorithm := let(stop="6ba"), callbacks=[Interrupt()], fit=False)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        copy.deepcopy(trainer.state.model)
        body = weakref.ref(algorithm._teacher.body)
        trainer.close()
        gc.collect()
        assert body() is None and not algorithm.guiding and not hooks(trainer)

    def test_one_instance_in_two_trainers(self, train, let):
        algorithm = let(stop="0.5dur")
        first = train(algorithm, max_duration="4ba", fit=False)
        first.fit(duration="1ba")
        second = train(algorithm, fit=False)
        assert not hooks(first)
        second.fit(duration="1ba")
        first.close()
        second.fit(duration="5ba")
        assert metrics(first, "let/active") == [1]
        assert metrics(second, "let/active") == [1, 1, 1, 0]


class TestBadRuns:
    """Every message says what was expected, what came and what to do, before a step is made."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"teacher": "./nowhere"}, "there is no teacher at './nowhere'"),
            ({"placement": "shard"}, "needs at least two ranks"),
            ({"implementation": "triton"}, "implementation"),
        ],
    )
    def test_before_training_starts(self, train, let, options, message):
        with pytest.raises(ValueError, match=message):
            train(let(**options), fit=False)

    def test_another_vocabulary(self, train, let, student):
        student.tokenizer = SimpleNamespace(get_vocab=lambda: {"w0": 0, "x": 1})
        with pytest.raises(ValueError, match="1 of 2 token ids differ .1 is 'x' here and 'w1' there"):
            train(let(), model=student, fit=False)

    def test_an_epoch_without_a_length(self, train, let):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from ()

        with pytest.raises(ValueError, match="stop is 1ep, but the training data loader has no length"):
            train(let(stop="1ep"), train_dataloader=torch.utils.data.DataLoader(Stream()), fit=False)
