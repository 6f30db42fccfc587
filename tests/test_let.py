"""What is LET's own: layers, resizing, what can carry a gradient."""

from typing import Any

import pytest
from composer.core import Algorithm, Event
from conftest import build_student, hf_student, metrics

from let_composer import LET


def test_layers_and_resizing(train, teacher_folder):
    losses = [
        metrics(train(LET(teacher_folder, stop="2ba", **{"weight": 0.1, **options}), max_duration="1ba"), "let/loss")[0]
        for options in (
            {},
            {"resize": "teacher"},
            {"student_layer": -1},
            {"student_layer": "model.transformer.blocks.1"},
            {"teacher_layer": 1},
        )
    ]
    assert len(set(losses)) == len(losses)


def test_frozen_blocks_are_refused(train, tokenizer, teacher_folder):
    model = build_student(tokenizer)
    for module in (model.model.transformer.wte, model.model.transformer.wpe, *model.model.transformer.blocks[:3]):
        module.requires_grad_(False)
    with pytest.raises(ValueError, match="something to train up to model.transformer.blocks.2 .student_layer 3."):
        train(LET(teacher_folder, stop="4ba", weight=0.1), model=model, fit=False)


class Freezes(Algorithm):
    """What LayerFreezing does, after two batches."""

    def match(self, event: Event, state: Any) -> bool:
        return event == Event.BATCH_START and state.timestamp.batch == 2

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        transformer = state.model.model.transformer
        for module in (transformer.wte, transformer.wpe, *transformer.blocks[:3]):
            module.requires_grad_(False)


def test_blocks_that_are_frozen_in_the_middle_end_the_guidance(train, teacher_folder, caplog):
    trainer = train(Freezes(), LET(teacher_folder, stop="5ba", weight=1.0))
    assert metrics(trainer, "let/active") == [1, 1, 1, 0]
    assert "LET ends early: everything up to the guided block is frozen now" in caplog.text
    assert not trainer.state.model.model.transformer.blocks[2]._forward_hooks


def test_a_block_whose_parameters_train_but_whose_output_carries_no_gradient(train, tokenizer, teacher_folder):
    model = hf_student(tokenizer, teacher_folder)
    model.model.model.layers[0].register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
    with pytest.raises(RuntimeError, match="student_layer 1 to carry a gradient"):
        train(LET(teacher_folder, student_layer=1, stop="4ba", weight=0.1), model=model)
