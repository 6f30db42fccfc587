"""Loading, checking, running and sharding teachers; every family through a real folder or file."""

import contextlib
import copy
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import LENGTH, VOCABULARY, Sizes
from transformers import AutoModel, BertConfig, DistilBertConfig, LlamaConfig, LlamaForCausalLM, T5Config

from let_composer.masks import needs_mask
from let_composer.teacher import Teacher, build_body
from let_composer.teacher_checks import fingerprint
from let_composer.vocabulary import check_vocabulary, read_vocabulary, student_vocabulary


@pytest.mark.parametrize(("layer", "blocks"), [(1, 1), (-2, 1), (2, 2), (-1, 2)])
def test_a_middle_layer_drops_the_blocks_behind_it(teacher_folder, layer, blocks):
    teacher = Teacher(teacher_folder, layer=layer)
    model = LlamaForCausalLM.from_pretrained(teacher_folder).eval()
    ids = torch.randint(0, VOCABULARY, (2, 8))
    expected = model(ids, output_hidden_states=True).hidden_states[blocks]
    torch.testing.assert_close(teacher.hidden(ids), expected)
    assert len(teacher.body.layers) == blocks


def write_gguf(path, model: LlamaForCausalLM, tokens: list[str]) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("test")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list(tokens)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.detach().clone()
        if "q_proj" in name or "k_proj" in name:  # GGUF keeps rotary halves interleaved
            heads, (rows, columns) = config.num_attention_heads, data.shape
            data = data.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(data.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_teacher(teacher_folder, tokenizer, tmp_path):
    model = LlamaForCausalLM.from_pretrained(teacher_folder).eval()
    tokens = tokenizer.convert_ids_to_tokens(range(VOCABULARY))
    write_gguf(tmp_path / "teacher.gguf", model, tokens)
    name = str(tmp_path / "teacher.gguf")
    ids = torch.randint(0, VOCABULARY, (2, 8))
    torch.testing.assert_close(Teacher(name).hidden(ids), model.model(ids).last_hidden_state)
    assert read_vocabulary(name) == dict(enumerate(tokens))


def test_the_fingerprint_is_of_the_body_in_any_type(teacher_folder):
    teacher = Teacher(teacher_folder)
    assert teacher.fingerprint == Teacher(teacher_folder, head=True).fingerprint
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        body = copy.deepcopy(teacher.body).to(dtype)
        assert (fingerprint(body.named_parameters()) == teacher.fingerprint) is (dtype != torch.float8_e4m3fn)
        before = fingerprint(body.named_parameters())
        weight = body.layers[1].mlp.down_proj.weight.data
        weight[-1, -1] = (2 * weight[-1, -1].float()).to(dtype)
        assert fingerprint(body.named_parameters()) != before
    with Sizes(torch.ops.aten._to_copy.default) as copies:
        fingerprint([("large", torch.zeros(2**24))])
    assert copies.found == [2**22] * 4


def test_a_teacher_that_does_not_fit(teacher_folder, monkeypatch):
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**20, 80 * 2**20))
    waiting = Teacher(teacher_folder, device="cuda", placement="shard")
    assert {(p.device.type, p.dtype) for p in waiting.body.parameters()} == {("cpu", torch.bfloat16)}
    monkeypatch.setattr("let_composer.teacher.load", full)
    size = 2 * sum(p.numel() for p in LlamaForCausalLM.from_pretrained(teacher_folder).model.parameters()) / 2**20
    with pytest.raises(ValueError, match=f"take {size:.1f} MiB, and 3.0 of 80.0 MiB are free.*placement: shard"):
        Teacher(teacher_folder, device="cuda", check=False)


@pytest.mark.parametrize("length", [LENGTH, LENGTH + 5, 3 * LENGTH])
def test_a_sequence_beyond_its_context_runs_in_windows_whatever_its_padding_holds(teacher_folder, length):
    teacher = Teacher(teacher_folder)
    assert teacher.context == LENGTH
    ids = torch.randint(0, VOCABULARY - 2, (3, length))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0  # right
    mask[1, :3] = 0  # left
    other = ids.where(mask.bool(), VOCABULARY - 1)
    windows = zip(other.split(LENGTH, dim=1), mask.split(LENGTH, dim=1), strict=True)
    expected = torch.cat([teacher.hidden(*window) for window in windows], dim=1)
    torch.testing.assert_close(teacher.hidden(ids, mask)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no teacher at './nowhere'"),
        ("./missing.gguf", "there is no teacher at './missing.gguf'"),
        (".", "expected a model id on the hub, a folder with config.json"),
        ("nobody/no-such-model@main", "there is no teacher 'nobody/no-such-model@main': expected a model id"),
    ],
)
def test_no_such_teacher(monkeypatch, tmp_path, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        Teacher(name)


def test_a_hub_model_is_fetched_as_far_as_it_is_needed_or_is_what_the_cache_has(teacher_folder, monkeypatch, caplog):
    snapshot = Mock(return_value=teacher_folder)
    files = ["config.json", "model.safetensors", "README.md"]
    answers = Mock(side_effect=[files, files, ConnectionError("no network"), [*files, "merges.txt"]])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("let_composer.pretrained.snapshot_download", snapshot)
    monkeypatch.setattr("let_composer.pretrained.HfApi.list_repo_files", answers)
    build_body("owner/planned")
    assert snapshot.call_args.kwargs["allow_patterns"] == ["config.json"]
    assert Teacher("owner/trained@main").fingerprint == Teacher(teacher_folder).fingerprint
    given = {"repo_id": "owner/trained", "revision": "main", "allow_patterns": ["model.safetensors", "config.json"]}
    assert snapshot.call_args.kwargs.items() >= given.items()
    Teacher("owner/cached")
    assert snapshot.call_args.kwargs.items() >= {"repo_id": "owner/cached", "local_files_only": True}.items()
    assert "'owner/cached' could not be downloaded, the hub's cache is used: no network" in caplog.text
    snapshot.side_effect = [ConnectionError("cut"), teacher_folder]
    with pytest.raises(ValueError, match=r"'owner/cut' came in part, without merges.txt \(cut\). Start again"):
        Teacher("owner/cut")


def test_incomplete_weights_are_refused(teacher_folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(teacher_folder)
    weights = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks 3 of the weights of LlamaModel .for example layers.1.mlp"):
        Teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        (T5Config(9, d_model=8, num_layers=1, num_heads=1), ["is an encoder-decoder"] * 2),
        (BertConfig(9, 16, 1, 2), ["is not a causal decoder", "lacks .* of the weights"]),
        (DistilBertConfig(9, n_layers=1, n_heads=2, dim=16), ["is not a causal decoder", "Unrecognized configuration"]),
    ],
)
def test_a_model_that_sees_the_future_is_refused(tmp_path, config, messages):
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    for head, message in enumerate(messages):
        with pytest.raises(ValueError, match=message):
            Teacher(str(tmp_path), head=bool(head))


OURS = {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("theirs", "rows", "refused", "told"),
    [
        ({0: "a", 1: "x", 2: "c"}, 3, "1 of 3 token ids differ .1 is 'b' here and 'x' there", ""),
        (None, 2, "embeddings for 2 token ids.*goes up to id 2 .'c'", ""),
        ({**OURS, 3: "d"}, 8, "", ""),
        ({0: "a", 1: "b"}, 4, "", "never saw 1 of the student's tokens: 'c'"),  # added, in the padding rows
        (None, 4, "", "comes without a tokenizer"),
    ],
)
def test_vocabularies_are_compared(theirs, rows, refused, told, caplog):
    with pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext():
        check_vocabulary(OURS, theirs, rows=rows, name="t")
    assert told in caplog.text and bool(told) == bool(caplog.records)


def test_vocabularies_are_read_where_there_are_tokenizers(teacher_folder, tokenizer, student, tmp_path, caplog):
    expected = {i: t for t, i in tokenizer.get_vocab().items()}
    assert read_vocabulary(teacher_folder) == student_vocabulary(student) == expected
    LlamaConfig().save_pretrained(tmp_path)
    assert read_vocabulary(str(tmp_path)) is None
    assert student_vocabulary(student.model) == {}
    assert "the student's model has no tokenizer" in caplog.text


def test_padding_behind_the_tokens_needs_no_mask():
    """On an accelerator nobody looks."""
    behind = torch.ones(2, 8, dtype=torch.long)
    behind[1, 5:] = 0
    before = behind.flip(1)
    assert not needs_mask(None) and not needs_mask(behind) and not needs_mask(torch.zeros(1, 4))
    assert needs_mask(before) and needs_mask(before.bool()) and needs_mask(torch.empty(2, 8, device="meta"))
