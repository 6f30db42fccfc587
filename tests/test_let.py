"""What is LET's own: what can carry a gradient."""

import pytest
from composer.algorithms import LayerFreezing
from conftest import build_data, build_student, hf_student, metrics, parameters


def test_frozen_blocks_are_refused(train, tokenizer, let):
    model = build_student(tokenizer)
    for module in (model.model.transformer.wte, model.model.transformer.wpe, *model.model.transformer.blocks[:3]):
        module.requires_grad_(False)
    with pytest.raises(ValueError, match="something to train up to model.transformer.blocks.2 .student_layer 3."):
        train(let(stop="4ba"), model=model, fit=False)


def test_blocks_that_are_frozen_in_the_middle_end_the_guidance(train, tokenizer, let, caplog):
    data = build_data(tokenizer, samples=16)  # of two batches an epoch, after which a quarter more is frozen
    trainer = train(LayerFreezing(0.0, 1.0), let(student_layer=1, stop="8ba"), data=data, max_duration="4ep")
    assert metrics(trainer, "let/active") == [1, 1, 1, 1, 1, 0]
    assert "LET ends early: everything up to the guided block is frozen now" in caplog.text
    assert not trainer.state.model.model.transformer.blocks[0]._forward_hooks


def test_a_block_whose_parameters_train_but_whose_output_carries_no_gradient(train, tokenizer, let, teacher_folder):
    model = hf_student(tokenizer, teacher_folder)
    model.model.model.layers[0].register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
    with pytest.raises(RuntimeError, match="student_layer 1 to carry a gradient"):
        train(let(student_layer=1, stop="4ba"), model=model)


def test_a_student_with_lora(train, tokenizer, let, teacher_folder):
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = hf_student(tokenizer, teacher_folder, peft_config=lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(let(student_layer=1, stop="2ba"), model=model, max_duration="2ba")
    changed = [name for name, value in parameters(trainer).items() if not value.equal(before[name])]
    assert changed and all("lora_" in name for name in changed)
    assert all(ratio > 0.01 for ratio in metrics(trainer, "let/gradient_ratio"))
