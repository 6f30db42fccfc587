"""Blocks found by structure, and their output captured once per forward."""

import copy
import io
from typing import Any

import pytest
import torch
import transformers
from conftest import LENGTH, VOCABULARY
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from let_composer.student import Capture, find_blocks, matmul_parameters, resolve_layer

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SMALL = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "gpt2": transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=4, n_head=2),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "opt": transformers.OPTConfig(**SIZES, word_embed_proj_dim=16, ffn_dim=32),
}


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("layer", [1, 3, -2])
def test_the_captured_output_is_the_hidden_state_of_that_number(family, layer):
    torch.manual_seed(0)
    config: transformers.PretrainedConfig = copy.deepcopy(SMALL[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    capture = Capture(resolve_layer(model, layer)[1])
    capture.arm()
    ids = torch.randint(0, 99, (2, 8))
    expected = model(ids, output_hidden_states=True).hidden_states
    # the last of HF's hidden states is after the final norm, so count from the front: -2 is block 3 of 4
    torch.testing.assert_close(capture.take(), expected[layer if layer > 0 else 5 + layer], rtol=0, atol=0)


def test_experts_in_blocks_and_lists_of_another_length_are_no_blocks(student):
    experts, heads = (nn.ModuleList([nn.Linear(2, 2) for _ in range(count)]) for count in (4, 3))
    for block in student.model.transformer.blocks:
        block.experts = experts
    student.heads = heads
    assert find_blocks(student)[0] == "model.transformer.blocks"


def test_an_encoder_decoder_is_ambiguous_and_a_dotted_path_is_the_way_out():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(9, d_model=8, num_layers=2, num_heads=1))
    with pytest.raises(ValueError, match="found 2: encoder.block.*decoder.block.*dotted path"):
        find_blocks(model)
    with pytest.raises(ValueError, match="found 0: none"):
        find_blocks(model.lm_head)
    assert resolve_layer(model, "decoder.block.1") == ("decoder.block.1", model.decoder.block[1])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        *((number, f"student_layer must be between 1 and 4.*has 4 blocks. Got {number}") for number in (0, 5, -5)),
        ("transformer.block.2", "no module 'transformer.block.2'.*model.transformer.blocks"),
    ],
)
def test_a_wrong_number_or_path_is_told_what_there_is(student, layer, message):
    with pytest.raises(ValueError, match=message):
        resolve_layer(student, layer)


def test_blocks_are_found_below_what_wraps_them_and_their_paths_stay(student):
    blocks, path = student.model.transformer.blocks, "model.transformer.blocks.1"
    inner = blocks[1]
    assert resolve_layer(student, 2) == resolve_layer(student, -3) == (path, inner)
    blocks[1] = wrapper = checkpoint_wrapper(inner)
    assert resolve_layer(student, 2) == (path, wrapper) and resolve_layer(student, path)[1] is wrapper
    assert resolve_layer(student, f"{path}.ffn")[1] is inner.ffn


def test_unarmed_forwards_leave_nothing(student):
    capture = Capture(resolve_layer(student, 2)[1])
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    student({"input_ids": ids})
    assert capture.hidden is None
    with pytest.raises(RuntimeError, match="expected the captured block to return hidden states"):
        capture.take()
    capture.arm()
    student({"input_ids": ids})
    capture.remove()
    student({"input_ids": ids})
    assert capture.hidden is None and not student.model.transformer.blocks[1]._forward_hooks


def test_a_guided_model_can_be_saved_and_copied_and_the_copies_are_not_hooked(student):
    capture = Capture(resolve_layer(student, 2)[1])
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    capture.arm()
    student({"input_ids": ids})
    assert capture.hidden is not None and capture.hidden.grad_fn is not None  # deepcopy of such a tensor would raise
    torch.save(student.model, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(student.model), torch.load(file, weights_only=False)):
        capture.arm()
        torch.testing.assert_close(other(ids).logits, student.model(ids).logits)
        assert capture.take() is not None
        capture.arm()
        other(ids)
        assert capture.hidden is None


@pytest.mark.parametrize("family", SMALL)
def test_matmul_parameters(family):
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(SMALL[family]))
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) or "Conv1D" in str(type(m)))
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert matmul_parameters(model) == matrices + vectors
