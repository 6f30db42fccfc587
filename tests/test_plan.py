"""The planner against closed forms, against what the paper's sizes are, and its answers to bad input."""

import json
from pathlib import Path

import plan as script  # scripts/plan.py
import pytest
import torch
from llmfoundry.models.mpt import ComposerMPTCausalLM
from omegaconf import OmegaConf as om
from transformers import GPTNeoXConfig

from let_composer.teacher import Teacher, build_body

YAMLS = Path(__file__).parents[1] / "yamls"

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer was not provided")


@pytest.fixture
def small(tmp_path, teacher_folder) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(f"""
model:
  name: mpt_causal_lm
  d_model: 32
  n_heads: 2
  n_layers: 4
  expansion_ratio: 4
  max_seq_len: 16
  vocab_size: 64
  no_bias: true
  attn_config: {{attn_impl: torch}}
max_seq_len: 16
tokenizer: {{name: nowhere}}
optimizer: {{name: decoupled_adamw}}
algorithms: {{let: {{teacher: {teacher_folder}, stop: 0.5dur}}}}
max_duration: 100ba
global_train_batch_size: 8
device_train_microbatch_size: 4
precision: fp32
variables:
  data: ???
""")
    return str(path)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("let_125m", 123.6), ("let_350m", 359.9), ("let_1b4", 1401.8), ("baseline_3b", 2984.3), ("let_7b", 6989.5)],
)
def test_the_sized_yamls_are_what_their_first_lines_say(name, millions):
    """And planning them needs no network."""
    path = YAMLS / f"{name}.yaml"
    plan, on_8 = (script.main([str(path), "--gpus", gpus, "--gpu", "h100"]) for gpus in ("32", "8"))
    assert plan.student.parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert plan.tokens == pytest.approx({"let_125m": 2.5e9, "let_350m": 7e9}.get(name, 20e9), rel=0.01)
    model = om.load(path).model
    attention = 12 * model.n_layers * 2048 * model.d_model
    assert plan.student.flops == pytest.approx(6 * plan.student.matmul_parameters + attention, rel=1e-3)
    assert plan.hours and on_8.hours and sum(on_8.memory.values()) < 0.9 * 79  # the microbatch in the file fits
    head = path.read_text()
    assert f"not measured: {plan.run_flops / 1e18:,.0f} EFLOP" in head
    for gpus, found in ((8, on_8), (32, plan)):
        hours = f"{found.hours:.0f} h, {gpus * found.hours:.0f} GPU hours"
        if found.hours < 10:
            hours = f"{found.hours:.1f} h, {gpus * found.hours:.0f} GPU hours"
        assert f"{gpus:2} GPUs: {hours}, {sum(found.memory.values()):.0f} GiB a GPU" in head
    if name.startswith("let_"):
        assert plan.teacher and plan.student.parameters > 5 * plan.teacher.parameters
        assert plan.guided_tokens == pytest.approx(0.5 * plan.tokens, rel=0.01)
        assert f"step costs {100 * plan.guided_overhead:.1f} % more FLOPs" in head
        assert f"pays once it saves {plan.break_even_tokens / 1e9:.2f}B tokens" in head


@pytest.mark.parametrize(
    ("size", "parameters"),  # without embeddings, as EleutherAI publishes them
    [("14m", 1_189_888), ("70m", 18_915_328), ("160m", 85_056_000), ("410m", 302_311_424), ("1b", 805_736_448)],
)
def test_the_shapes_of_the_known_teachers(size, parameters):
    config = script.teacher_config(f"EleutherAI/pythia-{size}@step1000")
    assert isinstance(config, GPTNeoXConfig)
    body = build_body(config)
    assert all(p.device.type == "meta" for p in body.parameters())
    assert sum(p.numel() for p in body.parameters()) - body.embed_in.weight.numel() == parameters


def test_flops_by_hand(small):
    plan = script.main([small, "--gpus", "1"])
    # Of one token: each parameter of the blocks and the tied head is multiplied twice, scores and values 2 S D each.
    block = 4 * 32 * 32 + 8 * 32 * 32
    forward = 2 * (4 * block + 64 * 32) + 4 * 4 * 16 * 32
    assert plan.student.block_flops == forward - 2 * 64 * 32
    assert plan.student.flops == 3 * forward
    assert plan.teacher
    teacher = 2 * 2 * (4 * 24 * 24 + 3 * 24 * 48) + 2 * 4 * 16 * 24
    assert plan.teacher.flops == pytest.approx(teacher, rel=1e-3)  # and its rotary angles
    assert plan.guided_overhead == pytest.approx(teacher / (3 * forward), rel=1e-3)
    assert (plan.steps, plan.guided_steps, plan.tokens) == (100, 50, 100 * 8 * 16)
    assert plan.break_even_tokens == pytest.approx(plan.guided_overhead * 50 * 128)


def test_activations_are_what_a_real_step_keeps(small, teacher_folder):
    plan = script.main([small, "--gpus", "1"])
    model = ComposerMPTCausalLM(
        d_model=32, n_heads=2, n_layers=4, max_seq_len=16, vocab_size=64, no_bias=True,
        attn_config={"attn_impl": "torch"}, loss_fn="torch_crossentropy",
    )  # fmt: skip
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
    assert plan.student.activations == pytest.approx(sum(kept.values()) + logits, rel=0.02)
    assert plan.student.checkpointed_activations < plan.student.activations
    assert loss.requires_grad


def test_a_teacher_cut_at_a_layer_costs_less(small, teacher_folder):
    whole, cut = (script.main([small, "--gpus", "1", f"algorithms.let.teacher_layer={k}"]) for k in (-1, 1))
    assert whole.teacher and cut.teacher
    assert 2 * cut.teacher.flops == pytest.approx(whole.teacher.flops, rel=1e-3)
    assert cut.teacher.matmul_parameters == Teacher(teacher_folder, layer=1).parameters


def test_checkpointing_sharding_and_memory(small):
    plain = script.main([small, "--gpus", "4"])
    sharded = script.main([small, "--gpus", "4", "fsdp_config={activation_checkpointing: true}"])
    assert sharded.memory["weights"] * 4 == plain.memory["weights"] == plain.student.parameters * 4 / 2**30
    assert sharded.memory["activations"] < plain.memory["activations"]
    assert sharded.step_flops == plain.step_flops + 8 * 16 * plain.student.block_flops


def test_a_teacher_that_is_too_big_is_sharded_and_a_run_that_is_too_big_said_so(small, capsys):
    plan = script.main(
        [str(YAMLS / "let_7b.yaml"), "--gpus", "32", "--gpu", "mine", "--tflops", "100", "--memory", "21"]
    )
    assert plan.placement == "shard"
    assert "does not fit" in capsys.readouterr().out
    assert script.main([str(YAMLS / "let_7b.yaml"), "--gpus", "32", "--gpu", "h200"]).placement == "replicate"


def test_the_json_has_all_of_it(small, tmp_path):
    plan = script.main([small, "--gpus", "1", "--out", str(tmp_path / "out" / "plan.json")])
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["student"]["flops"] == plan.student.flops
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "no figures for 'h1000': give its dense peak with --tflops"),
        (["--tflops", "3"], "--tflops and --memory go together"),
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
    ],
)
def test_bad_arguments(small, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.main([small, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_train_batch_size=6", "global_train_batch_size 6 does not divide by 4 GPUs"),
        ("max_duration=1ep", "known only to whoever reads the data"),
        ("max_seq_len=null", "no max_seq_len, which planning needs"),
        ("optimizer.name=shampoo", "adam, lion and sgd, got 'shampoo'"),
        ("fsdp_config={sharding_strategy: HYBRID_SHARD}", "FULL_SHARD and NO_SHARD, got HYBRID_SHARD"),
        ("algorithms.let.stop=soon", "stop"),
        ("algorithms.let.teacher=./nowhere", "no teacher at './nowhere'"),
    ],
)
def test_bad_yamls(small, override, message):
    with pytest.raises(ValueError, match=message):
        script.main([small, "--gpus", "4", override])
