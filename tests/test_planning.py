"""The planner against closed forms, against what the paper's sizes are, and its answers to bad input."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import foundry_yaml

from let_composer import planning as script
from let_composer.cli import main
from let_composer.configuration import load
from let_composer.counting import build_model, build_student, count_student, refuse_uncountable, teacher_config
from let_composer.teacher import Teacher, build_body

YAMLS = Path(__file__).parents[1] / "yamls"


def plan(path: str, *overrides: str, gpus: int = 1, hardware: script.Hardware | None = None) -> script.Plan:
    return script.make_plan(load(path, list(overrides)), gpus, hardware, 0.4)


@pytest.fixture
def small(tmp_path, teacher_folder) -> str:
    return foundry_yaml(tmp_path, algorithms={"let": {"teacher": teacher_folder, "weight": 0.1, "stop": "0.5dur"}})


@pytest.mark.parametrize(
    ("name", "millions"), [("let_125m", 123.6), ("let_1b4", 1401.8), ("baseline_3b", 2984.3), ("let_7b", 6989.5)]
)
def test_the_sized_yamls_cost_what_their_first_lines_say(name, millions):
    """And planning them needs no network."""
    path = YAMLS / f"{name}.yaml"
    found, more = (plan(str(path), gpus=gpus, hardware=script.HARDWARE["h100"]) for gpus in (8, 32))
    assert found.student.parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert found.tokens == pytest.approx(2.5e9 if name == "let_125m" else 20e9, rel=0.01)
    assert sum(found.memory.values()) < 0.9 * 79  # the microbatch in the file fits
    head = path.read_text()
    assert f"not measured: {found.run_flops / 1e18:,.0f} EFLOP" in head
    for on in (found, more):
        hours = f"{on.hours:.{0 if on.hours > 10 else 1}f} h, {on.gpus * on.hours:.0f} GPU hours"
        assert f"{on.gpus:2} GPUs: {hours}, {sum(on.memory.values()):.0f} GiB a GPU" in head
    if name.startswith("let_"):
        assert found.guided_tokens == pytest.approx(0.5 * found.tokens, rel=0.01)
        assert f"step costs {100 * found.guided_overhead:.1f} % more FLOPs" in head
        assert f"pays once it saves {found.break_even_tokens / 1e9:.2f}B tokens" in head
    if name in ("let_1b4", "let_7b"):
        overhead, share = found.guided_overhead, found.break_even_tokens / found.tokens
        cells = f"+{overhead:.1%} FLOPs | +{share:.1%} | {found.break_even_tokens / 1e9:.2f}B tokens".replace("%", " %")
        row = f"| `{name}` | {found.teacher_name} | {cells} | {more.hours:.1f} | {sum(more.memory.values()):.0f} |"
        assert row.replace("EleutherAI/", "") in (YAMLS.parent / "README.md").read_text()


def test_the_shapes_of_the_known_teachers():
    published = {"14m": 1_189_888, "70m": 18_915_328, "160m": 85_056_000, "410m": 302_311_424, "1b": 805_736_448}
    for size, parameters in published.items():  # without embeddings
        body = build_body(teacher_config(f"EleutherAI/pythia-{size}@step1000"))
        assert all(p.device.type == "meta" for p in body.parameters())
        assert sum(p.numel() for p in body.parameters()) - body.embed_in.weight.numel() == parameters


def test_flops_by_hand(small):
    found = plan(small)
    # Of one token: each parameter of the blocks and the tied head is multiplied twice, scores and values 2 S D each.
    block = 4 * 32 * 32 + 8 * 32 * 32
    forward = 2 * (4 * block + 64 * 32) + 4 * 4 * 16 * 32
    assert found.student.flops == 3 * forward
    teacher = 2 * 2 * (4 * 24 * 24 + 3 * 24 * 48) + 2 * 4 * 16 * 24
    assert found.teacher.flops == pytest.approx(teacher, rel=1e-3)  # and its rotary angles
    assert found.guided_overhead == pytest.approx(teacher / (3 * forward), rel=1e-3)
    assert (found.steps, found.guided_steps, found.tokens) == (100, 50, 100 * 8 * 16)
    assert found.break_even_tokens == pytest.approx(found.guided_overhead * 50 * 128)


def test_activations_are_what_a_real_step_keeps(small):
    found = plan(small)
    model = build_model(load(small, []), {"init_device": "cpu"})
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(64, (4, 16))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(model({"input_ids": ids}), {"labels": ids})
    logits = 2 * 4 * 16 * 64 * 4  # themselves, held by the trainer, and their gradient
    assert found.student.activations == pytest.approx(sum(kept.values()) + logits, rel=0.02)
    assert loss.requires_grad


def test_a_teacher_cut_at_a_layer_costs_less(small, teacher_folder):
    whole, cut = (plan(small, f"algorithms.let.teacher_layer={k}") for k in (-1, 1))
    assert 2 * cut.teacher.flops == pytest.approx(whole.teacher.flops, rel=1e-3)
    assert cut.teacher.matmul_parameters == Teacher(teacher_folder, layer=1).parameters


def test_checkpointing_sharding_placement_and_memory(small, capsys):
    plain = plan(small, gpus=4)
    sharded = plan(small, "fsdp_config={activation_checkpointing: true}", "algorithms.let.placement=shard", gpus=4)
    assert sharded.memory["weights"] * 4 == plain.memory["weights"] == plain.student.parameters * 4 / 2**30
    assert sharded.memory["activations"] < plain.memory["activations"]
    assert sharded.step_flops - plain.step_flops == 8 * 16 * (plain.student.flops / 3 - 2 * 64 * 32)  # but the head
    spared = plain.teacher.parameters * 3 / 4 - 2 * plain.teacher.largest_unit
    assert plain.memory["teacher"] - sharded.memory["teacher"] == pytest.approx(4 * spared / 2**30)
    assert main(["plan", small, "--gpus", "1", "--gpu", "mine", "--tflops", "100", "--memory", "0.0001"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_auto_is_planned_as_what_fits(small, capsys):
    auto = "device_train_microbatch_size=auto"
    sizes = {m: sum(plan(small, f"device_train_microbatch_size={m}").memory.values()) for m in (2, 4, 8)}
    found = plan(small, auto, hardware=script.Hardware("mine", 100, (sizes[2] + sizes[4]) / 2 / 0.9))
    assert (found.microbatch, found.auto, sum(found.memory.values())) == (2, True, pytest.approx(sizes[2]))
    assert plan(small, auto).microbatch == plan(small, auto, hardware=script.HARDWARE["h100"]).microbatch == 8
    assert main(["plan", small, auto, "--gpus", "1"]) == 0
    assert "microbatch 8, auto: the whole batch of a GPU; --gpu finds what fits" in capsys.readouterr().out


def test_distillation_is_planned_with_its_logits(small, teacher_folder):
    one = f"{{teacher: {teacher_folder}, weight: 0.1}}"
    let, rkd, salt, both = (
        plan(small, "algorithms=null", *(f"algorithms.{name}={one}" for name in names))
        for names in (["let"], ["rkd"], ["salt"], ["let", "rkd"])
    )
    assert rkd.teacher.flops - let.teacher.flops == 2 * 24 * 64
    assert (rkd.guided_steps, salt.guided_steps, both.guided_steps, let.guided_steps) == (100, 50, 100, 50)
    assert both.teacher == rkd.teacher and both.methods == ["let", "rkd"]
    assert rkd.memory["distillation"] * 2**30 == 64 * 2 * 64 * (4 + 8)  # a microbatch of 4 x 16 tokens, all in a chunk
    auto = plan(small, "algorithms.let.weight=auto")
    assert auto.teacher.logits == 64 and not {"distillation"} & (auto.memory | let.memory).keys()
    with pytest.raises(ValueError, match="planning knows one teacher"):
        plan(small, "algorithms.rkd={teacher: other}")


def test_a_method_that_is_off_costs_nothing(small, teacher_folder):
    off, none = plan(small, "algorithms.let.weight=0"), plan(small, "algorithms=null")
    assert off == none and off.teacher is None and off.methods == []
    rkd = plan(
        small, "algorithms.let.weight=0", "algorithms.let.teacher=other", f"algorithms.rkd.teacher={teacher_folder}"
    )
    assert (rkd.methods, rkd.guided_steps, rkd.teacher_name) == (["rkd"], 100, teacher_folder)


def test_frozen_weights_are_not_trained(small):
    model, fused = build_student(load(small, []), torch.float32)
    every = count_student(model, 4, 16, fused)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)  # as peft leaves its adapters
    few = count_student(model, 4, 16, fused)
    assert every.trained == every.parameters == few.parameters
    assert few.trained == sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert few.flops < every.flops  # no gradients of matrices


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_local_experts": 8}, r"a mixture of experts \(num_local_experts\): planning counts dense"),
        ({"ffn_config": {"ffn_type": "torch_dmoe"}}, r"a mixture of experts \(torch_dmoe\)"),
        ({"mamba_d_state": 16}, r"a hybrid or state-space model \(mamba_d_state\)"),
    ],
)
def test_models_that_are_not_dense_transformers_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        refuse_uncountable(entries, "the student")


def test_the_json_has_all_of_it(small, tmp_path):
    out = tmp_path / "out" / "plan.json"
    assert main(["plan", small, "--gpus", "1", "--gpu", "h100", "--price", "2.5", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["student"]["flops"] == plan(small).student.flops
    assert written["price"] == pytest.approx(2.5 * written["hours"])
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "has no 'h1000' .did you mean 'h100'"),
        (["--tflops", "3"], "--tflops and --memory go together"),
        (["--gpus", "0"], "expected --gpus above 0, got 0"),
        (["--price", "2"], "--price needs the GPU's speed: give --gpu"),
        (["--gpus", "4", "global_train_batch_size=6"], "global_train_batch_size 6 does not divide by 4 GPUs"),
        (["max_duration=1ep"], "known only to whoever reads the data"),
        (["max_seq_len=null", "optimizer=null"], "no max_seq_len, optimizer.name, which planning needs"),
        (["global_train_batch_size=null"], "no global_train_batch_size, which planning needs. Give it there"),
        (["optimizer.name=shampoo"], "adam, lion, sgd, got 'shampoo'"),
        (["fsdp_config={sharding_strategy: HYBRID_SHARD}"], "FULL_SHARD and NO_SHARD, got HYBRID_SHARD"),
        (["fsdp_config={activation_checkpoint: true}"], "no 'activation_checkpoint' .did you mean 'activation_check"),
        (["tp_config={tensor_parallel_degree: 2}"], "planning does not know tensor parallelism"),
        (["global_batch=6"], "the YAML has no 'global_batch'"),
        (["model.n_layer=2"], "model has no 'n_layer' .did you mean 'n_layers'"),
        (["algorithms.let.stop=soon"], "stop"),
        (["algorithms.let.wieght=2"], "LET has no 'wieght' .did you mean 'weight'"),
        (["algorithms.let.teacher=./nowhere"], "no teacher at './nowhere'"),
    ],
)
def test_bad_input_is_explained(small, arguments, message, capsys):
    assert main(["plan", small, *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
