"""From waiting to the end: off, resumption, retirement, a clock that goes back, closing, bad input."""

import gc
import weakref
from typing import Any

import pytest
import torch
from composer import DataSpec, Trainer
from composer.core import Event, Time
from composer.loggers import InMemoryLogger
from conftest import LENGTH, assert_equal, build_data, build_student, evaluator, metrics, parameters
from transformers import LlamaForCausalLM

from let_composer import LET, SALT
from let_composer.lifecycle import _EVENTS, Phase
from let_composer.teacher import Teacher


class TestOff:
    """Invariant 1: weight 0 and a finished schedule are bit-identical to a run without LET."""

    @pytest.mark.parametrize("method", [LET, SALT])
    def test_weight_zero(self, train, tokenizer, method):
        def run(*algorithms: Any) -> tuple[Any, torch.Tensor]:
            trainer = train(*algorithms, model=build_student(tokenizer, resid_pdrop=0.1))
            return trainer, torch.get_rng_state()

        (plain, state), (off, state_off) = run(), run(method(teacher="./nowhere", weight=0))
        assert_equal(parameters(plain), parameters(off))
        assert torch.equal(state, state_off)
        assert metrics(plain, "loss/train/total") == metrics(off, "loss/train/total")
        assert not any(name.startswith(f"{method.prefix}/") for name in off.logger.destinations[0].data)

    def test_a_resume_after_the_end_loads_no_teacher_and_is_a_plain_run(self, train, teacher_folder, tmp_path):
        train(LET(teacher_folder, stop="2ba", weight=1.0), save_folder=str(tmp_path), save_interval="3ba", run_name="r")
        load = {"load_path": str(tmp_path / "ep0-ba3-rank0.pt")}
        plain = train(**load)
        moved = LET("./nowhere", stop="2ba", weight=1.0)
        resumed = train(moved, **load)
        assert_equal(parameters(plain), parameters(resumed))
        assert moved._teacher is None and moved.phase is Phase.ENDED


class TestResume:
    """Invariant 4: stopping and resuming equals never having stopped."""

    @pytest.mark.parametrize(
        "options", [{}, {"normalize_teacher": "standardize", "stop": "0.6dur", "anneal": "cosine"}]
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
        train(
            LET(teacher_folder, stop="0.5dur", weight=0.1),
            save_folder=str(tmp_path),
            save_interval="2ba",
            max_duration="8ba",
        )
        algorithm = LET(teacher_folder, stop="0.5dur", weight=0.1)
        resumed = train(algorithm, load_path=str(tmp_path / "ep0-ba2-rank0.pt"), max_duration="16ba", fit=False)
        assert algorithm.schedule.end == Time.from_timestring("4ba")
        resumed.close()

    def test_a_changed_stop_counts_and_is_reported(self, train, teacher_folder, tmp_path, caplog):
        train(
            LET(teacher_folder, stop="0.5dur", weight=0.1),
            save_folder=str(tmp_path),
            save_interval="2ba",
            max_duration="8ba",
        )
        algorithm = LET(teacher_folder, stop="0.75dur", student_layer=2, weight=0.1)
        train(algorithm, load_path=str(tmp_path / "ep0-ba2-rank0.pt"), max_duration="8ba", fit=False)
        assert algorithm.schedule.end == Time.from_timestring("6ba")
        assert "made with let.stop: '0.5dur', this run goes on with '0.75dur'" in caplog.text
        assert "made with let.student_layer: 3, this run goes on with 2" in caplog.text

    def test_added_to_an_old_run(self, train, teacher_folder, tmp_path):
        train(save_folder=str(tmp_path), save_interval="2ba", max_duration="4ba")
        with pytest.warns(UserWarning, match="LET is not in the state_dict"):
            trainer = train(
                LET(teacher_folder, stop="4ba", weight=0.1),
                load_path=str(tmp_path / "ep0-ba2-rank0.pt"),
                max_duration="4ba",
            )
        assert metrics(trainer, "let/weight") == [0.05, 0.025, 0.0]


class TestRetirement:
    """Invariant 6: after the end nothing is left."""

    @pytest.mark.parametrize("stop", ["0.5dur", f"{3 * 8 * LENGTH}tok", "24sp"])
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
        assert [event for event in Event if algorithm.match(event, trainer.state)] == [Event.INIT, Event.FIT_START]
        assert metrics(trainer, "let/active") == [1, 1, 1, 0]
        assert metrics(trainer, "let/weight") == pytest.approx([1, 2 / 3, 1 / 3, 0])
        assert len(metrics(trainer, "let/loss")) == 3

    def test_once_and_with_the_step_and_the_memory(self, train, teacher_folder, caplog):
        trainer = train(LET(teacher_folder, stop="2ba", weight=0.1))
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

    def test_max_duration_given_to_fit(self, train, teacher_folder, caplog):
        trainer = train(LET(teacher_folder, stop="0.5dur", weight=0.1), max_duration=None, fit=False)
        trainer.fit(duration="4ba")
        assert metrics(trainer, "let/active") == [1, 1, 0]
        assert "LET guides until 2ba" in caplog.text

    def test_one_instance_in_two_trainers(self, train, teacher_folder):
        algorithm = LET(teacher_folder, stop="0.5dur", weight=1.0)
        first, second = train(algorithm, max_duration="4ba"), train(algorithm, max_duration="6ba")
        assert metrics(first, "let/active") == [1, 1, 0]
        assert metrics(second, "let/active") == [1, 1, 1, 0]


class TestClock:
    """A clock that goes back starts the guidance anew; a run that is longer does not."""

    def test_a_second_fit_with_a_reset_clock(self, train, teacher_folder):
        trainer = train(LET(teacher_folder, stop="0.5dur", weight=1.0), max_duration="4ba")
        trainer.fit(duration="8ba", reset_time=True)
        assert metrics(trainer, "let/weight") == [1, 0.5, 0, 1, 0.75, 0.5, 0.25, 0]

    def test_in_the_middle_of_the_guidance(self, train, teacher_folder):
        algorithm = LET(teacher_folder, stop="4ba", weight=1.0, normalize_teacher="center")
        trainer = train(algorithm, max_duration="2ba")
        trainer.fit(duration="2ba", reset_time=True)
        assert metrics(trainer, "let/weight") == [1, 0.75, 1, 0.75]
        assert algorithm.saved()["statistics"]["moments"][0][0] == 2 * 8 * (LENGTH - 1)

    @pytest.mark.parametrize("how", ["reset_time", "load_ignore_keys"])
    def test_a_finished_run_is_loaded_and_trained_anew(self, train, teacher_folder, tmp_path, how):
        options = {"save_folder": str(tmp_path), "save_interval": "4ba"}
        train(LET(teacher_folder, stop="0.5dur", weight=1.0), max_duration="4ba", **options)
        load = {"load_path": str(tmp_path / "ep0-ba4-rank0.pt"), "fit": False}
        if how == "load_ignore_keys":
            load["load_ignore_keys"] = ["state/timestamp"]
        trainer = train(LET(teacher_folder, stop="0.5dur", weight=1.0), max_duration="8ba", **load)
        trainer.fit(**({"duration": "8ba", "reset_time": True} if how == "reset_time" else {}))
        assert metrics(trainer, "let/weight") == [1, 0.75, 0.5, 0.25, 0]

    def test_a_stop_past_the_first_part_of_a_run(self, train, teacher_folder, tmp_path, caplog):
        """As in Composer's own test of resumption: one part of a run, then the whole."""
        whole = train(LET(teacher_folder, stop="3ba", weight=1.0), max_duration="4ba")
        part = {"max_duration": "2ba", "save_folder": str(tmp_path), "save_interval": "2ba"}
        train(LET(teacher_folder, stop="3ba", weight=1.0), **part)
        assert "stop is 3ba, but max_duration is 2ba" in caplog.text
        load = {"load_path": str(tmp_path / "ep0-ba2-rank0.pt"), "max_duration": "4ba"}
        resumed = train(LET(teacher_folder, stop="3ba", weight=1.0), **load)
        assert_equal(parameters(whole), parameters(resumed))
        assert whole.state.algorithms[0].state_dict() == resumed.state.algorithms[0].state_dict()


class TestOtherSettings:
    """A checkpoint of a run with other settings."""

    def test_each_is_named(self, train, teacher_folder, tmp_path, caplog):
        train(
            LET(teacher_folder, stop="4ba", weight=0.1),
            save_folder=str(tmp_path),
            save_interval="2ba",
            max_duration="2ba",
        )
        others = {"weight": 0.3, "anneal": "cosine", "resize": "teacher", "normalize_teacher": "center"}
        load = {"load_path": str(tmp_path / "ep0-ba2-rank0.pt"), "fit": False}
        train(LET(teacher_folder, stop="4ba", implementation="torch", **others), **load)
        for key, value in others.items():
            assert (
                f"let.{key}: {LET(weight=0.1).options.__getattribute__(key)!r}, this run goes on with {value!r}"
                in caplog.text
            )
        assert "let.implementation" not in caplog.text

    def test_statistics_belong_to_weights_not_to_a_name(self, train, tokenizer, teacher_folder, tmp_path, caplog):
        def run(folder: Any, **options: Any) -> LET:
            algorithm = LET(str(folder), stop="4ba", normalize_teacher="center", weight=0.1)
            train(algorithm, max_duration="4ba", **options)
            return algorithm

        copy, other = tmp_path / "copy", tmp_path / "other"
        model = LlamaForCausalLM.from_pretrained(teacher_folder)
        for folder in (copy, other):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        run(teacher_folder, save_folder=str(tmp_path), save_interval="2ba")
        load = {"load_path": str(tmp_path / "ep0-ba2-rank0.pt"), "fit": False}
        assert run(copy, **load).saved()["statistics"]["moments"] is not None
        assert "other teacher weights" not in caplog.text
        assert run(other, **load).saved()["statistics"]["moments"] is None
        assert "other teacher weights" in caplog.text


class TestLettingGo:
    """A Trainer that is not trained, closed or interrupted; a model that is saved meanwhile."""

    @pytest.mark.filterwarnings("ignore:No optimizer was specified")
    def test_a_trainer_that_only_evaluates_needs_no_teacher(self, tokenizer):
        trainer = Trainer(
            model=build_student(tokenizer),
            algorithms=LET("./nowhere", weight=0.1),
            eval_dataloader=evaluator(tokenizer),
            device="cpu",
            precision="fp32",
            progress_bar=False,
        )
        trainer.eval()

    def test_data_that_is_given_to_fit(self, tokenizer, teacher_folder):
        model = build_student(tokenizer)
        options = {"device": "cpu", "precision": "fp32", "progress_bar": False, "loggers": [InMemoryLogger()]}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(
            model=model, algorithms=LET(teacher_folder, stop="2ba", weight=0.1), optimizers=optimizer, **options
        )
        trainer.fit(train_dataloader=build_data(tokenizer), duration="3ba")
        assert metrics(trainer, "let/active") == [1, 1, 0]

    def test_a_closed_trainer(self, train, teacher_folder):
        algorithm = LET(teacher_folder, stop="6ba", weight=0.1)
        trainer = train(algorithm, fit=False)
        trainer.fit(duration="2ba")
        body = weakref.ref(algorithm._teacher.body)
        trainer.close()
        gc.collect()
        assert body() is None and algorithm.phase is Phase.ENDED
        assert not trainer.state.model.model.transformer.blocks[2]._forward_hooks

    def test_weight_zero_is_told(self, caplog):
        LET(weight=0)
        assert "LET has weight 0: the run is not guided" in caplog.text


class TestBadRuns:
    """Every message says what was expected, what came and what to do, before a step is made."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"teacher": "./nowhere"}, "there is no teacher at './nowhere'"),
            ({"student_layer": 31}, "has 4 blocks. Got 31"),
            ({"teacher_layer": 9, "weight": 0.1}, "has 2 blocks. Got 9"),
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
            train(LET(str(tmp_path), weight=0.1), fit=False)

    def test_an_epoch_without_a_length(self, train, tokenizer, teacher_folder):
        class Endless(torch.utils.data.IterableDataset):
            def __iter__(self):
                while True:
                    yield {"input_ids": [1] * LENGTH}

        finite = build_data(tokenizer)
        loader = torch.utils.data.DataLoader(Endless(), batch_size=8, collate_fn=finite.dataloader.collate_fn)
        data = DataSpec(loader, get_num_tokens_in_batch=finite.get_num_tokens_in_batch)
        with pytest.raises(ValueError, match="stop is 1ep, but the training data loader has no length"):
            train(LET(teacher_folder, stop="1ep", weight=0.1), data=data, fit=False)


def test_every_guided_event_is_handled_and_matching_changes_nothing(train, teacher_folder):
    algorithm = LET(teacher_folder, stop="4ba", weight=0.1)
    trainer = train(algorithm, fit=False)
    before = dict(vars(algorithm))
    assert {event for event in Event if algorithm.match(event, trainer.state)} == _EVENTS[Phase.GUIDING]
    assert vars(algorithm) == before
    assert repr(algorithm) == repr(LET(teacher_folder, stop="4ba", weight=0.1))
