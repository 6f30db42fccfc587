"""Teachers of many families, each through a real folder: what is refused by name, and what the others must keep."""

import copy
import functools
import json
import shutil
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, Reads, copy_teacher
from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM
from test_student import SIZES, SMALL
from test_teacher import write_gguf
from torch import nn

from let_composer.pretrained import wanted
from let_composer.student import matmul_parameters
from let_composer.teacher import Teacher, build_body
from let_composer.vocabulary import read_vocabulary

MPT: dict[str, Any] = {  # of llm-foundry, as a student is exported
    "vocab_size": 99,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "max_seq_len": 16,
    "attn_config": {"attn_impl": "torch"},
}
FAMILIES = {
    **SMALL,
    "mpt": MPTConfig(**MPT),
    "dynamic": transformers.LlamaConfig(
        **SIZES, max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "longrope": transformers.Phi3Config(
        **SIZES,
        pad_token_id=0,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=8),
    "gptj": transformers.GPTJConfig(vocab_size=99, n_embd=16, n_layer=2, n_head=2, rotary_dim=4),  # its head has a bias
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
}
WAITING = {"opt", "mixtral", "dynamic", "longrope"}  # families for which the host waits, as the docstring says
HYBRID = transformers.JambaConfig(
    **SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False, mamba_dt_rank=4
)


def save(config: Any, folder: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    build = MPTForCausalLM if isinstance(config, MPTConfig) else transformers.AutoModelForCausalLM.from_config
    model: Any = build(config).eval()
    for name, p in model.named_parameters():  # biases begin as zeros
        if name.endswith("bias"):
            nn.init.normal_(p)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    model = save(FAMILIES[request.param], folder)
    return request.param, model, Teacher(str(folder), head=True)


def test_states_and_logits_are_the_models_own_frozen_and_can_be_had_in_parts(family):
    _, model, teacher = family
    assert not teacher.body.training and not any(p.requires_grad for p in teacher.body.parameters())
    ids = torch.randint(0, 99, (2, 8))
    expected = model(ids, output_hidden_states=True)
    torch.testing.assert_close(teacher.hidden(ids), expected.hidden_states[-1])
    assert not teacher.hidden(ids).requires_grad
    torch.testing.assert_close(teacher.project(teacher.hidden(ids)), expected.logits)
    torch.testing.assert_close(teacher.project(teacher.hidden(ids)[:, 2:5]), expected.logits[:, 2:5])
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    held = {p.data_ptr() for p in [*teacher.body.parameters(), *teacher._head] if p is not None}
    assert len(held) == len(list(model.parameters()))
    assert not tied or len(held) == len(list(teacher.body.parameters()))
    assert teacher.head_parameters == sum(p.numel() for p in head.parameters())
    assert teacher.parameters == matmul_parameters(model) - teacher.head_parameters


def test_padding_in_front_changes_nothing(family):
    _, _, teacher = family
    ids = torch.randint(0, 99, (1, 8))
    mask = torch.tensor([[0] * 5 + [1] * 8])
    padded = torch.cat([torch.full((1, 5), 98), ids], dim=1)
    torch.testing.assert_close(teacher.hidden(padded, mask)[:, 5:], teacher.hidden(ids), rtol=1e-4, atol=1e-4)


def test_documents_of_a_packed_row_are_as_alone_or_refused(family):
    name, _, teacher = family
    first, second, third = (torch.randint(0, 99, (2, n)) for n in (5, 3, 6))
    ids = torch.cat([first, second, third], dim=1)
    documents = torch.tensor([[0] * 5 + [1] * 3 + [0] * 6] * 2)
    assert teacher.separates_documents == (name != "gpt2")
    if not teacher.separates_documents:
        with pytest.raises(ValueError, match="cannot separate the documents"):
            teacher.hidden(ids, sequence_id=documents)
        return
    alone = torch.cat([teacher.hidden(part) for part in (first, second, third)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    torch.testing.assert_close(teacher.hidden(ids, sequence_id=documents), alone, rtol=1e-4, atol=1e-4)
    found = teacher.hidden(ids, mask, documents)[:, :-2]
    torch.testing.assert_close(found, alone[:, :-2], rtol=1e-4, atol=1e-4)


def test_the_host_waits_for_no_device_but_with_the_families_named_in_the_docstring(family):
    name, _, teacher = family
    ids = torch.randint(0, 99, (2, 8))
    with Reads() as reads:
        teacher.hidden(ids)
    assert bool(reads.found) == (name in WAITING), reads.found


def test_a_hybrid_has_layers_but_does_not_separate_documents(tmp_path):
    model = save(HYBRID, tmp_path)
    ids = torch.randint(0, 99, (2, 8))
    teacher = Teacher(str(tmp_path), layer=2)
    torch.testing.assert_close(teacher.hidden(ids), model(ids, output_hidden_states=True).hidden_states[2])
    assert len(teacher.body.layers) == 2 and not teacher.separates_documents


@pytest.mark.parametrize(
    ("config", "ratio"),
    [
        (transformers.GraniteConfig(**SIZES, logits_scaling=8.0), 0.125),
        (transformers.CohereConfig(**SIZES, pad_token_id=0, logit_scale=0.0625), 0.0625),
        (MPTConfig(**MPT, logit_scale=3.0), 3),
    ],
)
def test_logits_that_the_model_rescales_are_refused(config, ratio, tmp_path):
    save(config, tmp_path)
    Teacher(str(tmp_path))
    with pytest.raises(ValueError, match=f"more to its logits than its LM head: they are about {ratio} times"):
        Teacher(str(tmp_path), head=True)


def test_a_model_without_its_head_is_refused_where_that_is_needed(train, let, teacher_folder, tokenizer, tmp_path):
    transformers.LlamaModel.from_pretrained(teacher_folder).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    train(let(teacher=str(tmp_path), weight=0.1), fit=False)
    with pytest.raises(ValueError, match="has no LM head.*weight: auto reads.*Give LET a number as weight"):
        train(let(teacher=str(tmp_path), weight="auto"), fit=False)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("layers.1.mlp", float("nan"), "weights that are NaN or infinite in 1 of 20 parameters.*layers.1.mlp"),
        ("embed_tokens", float("inf"), "weights that are NaN or infinite in .*embed_tokens"),
        ("model.norm", 3e38, "hidden states that are NaN or infinite"),
    ],
)
def test_weights_and_states_that_are_not_finite_are_refused(teacher_folder, tmp_path, place, value, message):
    def spoil(model: Any) -> None:
        next(p for name, p in model.named_parameters() if place in name).data[..., -1] = value

    with pytest.raises(ValueError, match=message):
        Teacher(copy_teacher(teacher_folder, tmp_path, spoil))


@pytest.fixture
def copied(teacher_folder, tmp_path) -> Any:
    return shutil.copytree(teacher_folder, tmp_path / "copy")


@pytest.mark.parametrize("look", [build_body, Teacher, functools.partial(Teacher, head=True)])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}, "is a PEFT adapter.*merge_and_unload"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "with gptq, which needs .* gptqmodel"),
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig"}}, "own code.*_code: true"),
    ],
)
def test_what_would_be_another_model_or_run_code_is_refused(copied, look, file, content, message):
    (copied / "code.py").write_text("raise SystemExit('this code must not run')")
    before = (copied / file).read_text() if (copied / file).exists() else "{}"
    (copied / file).write_text(json.dumps({**json.loads(before), **content}))
    with pytest.raises(ValueError, match=message):
        look(str(copied))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "pytorch_model.bin", "teacher.gguf"]
)
def test_a_damaged_file_is_named_with_its_size(copied, tokenizer, name):
    file, teacher = copied / name, str(copied)
    model = transformers.LlamaForCausalLM.from_pretrained(copied)
    if name == "teacher.gguf":
        teacher = str(file)
        write_gguf(file, model, tokenizer.convert_ids_to_tokens(range(VOCABULARY)))
    elif name == "pytorch_model.bin":
        (copied / "model.safetensors").unlink()
        model.save_pretrained(copied, safe_serialization=False)
    Teacher(teacher)
    whole = file.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is damaged, or only half"),
        (whole[:10], "is damaged"),
        (b"", "is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs.*git lfs pull"),
    ):
        file.write_bytes(content)
        for read in (Teacher, read_vocabulary):
            with pytest.raises(ValueError, match=rf"{name} of teacher .*\({len(content)} bytes.*{message}"):
                read(teacher)


def test_a_tokenizer_that_cannot_be_read_is_not_taken_for_none(copied):
    (copied / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="the tokenizer of teacher .* cannot be read.*tokenizer.json"):
        read_vocabulary(str(copied))


def test_what_is_downloaded():
    texts = ["config.json", "tokenizer.json", "code.py", "merges.txt", "own.vocab"]
    extra = ["onnx/model.safetensors", "flax_model.msgpack", "consolidated.safetensors", "README.md"]
    safe = ["model-00001-of-2.safetensors", "model-00002-of-2.safetensors"]
    assert wanted([*texts, *extra, *safe, "pytorch_model.bin"]) == [*safe, *texts]
    assert wanted([*texts, "pytorch_model.bin", "training_args.bin"]) == ["pytorch_model.bin", *texts]
    other = ["model.safetensors.index.json", "weights-1-of-1.safetensors"]
    assert wanted([*other, "adapter_model.safetensors"]) == [other[1], other[0]]
