"""Load, check, freeze, place and run the teacher: the body of a small pretrained decoder, without its LM head."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from let_composer.student import Capture, blocks_passed, depth, find_blocks, matmul_parameters

__all__ = ["Placement", "Teacher", "build_body", "check_vocabulary", "needs_mask", "read_vocabulary"]

Placement = Literal["replicate", "shard"]

log = logging.getLogger(__name__)


class Teacher:
    """A frozen decoder body that turns token ids into hidden states.

    It belongs to no other module, so it is in nobody's checkpoint, optimizer, wrapping or export.

    Args:
        name: Hub id, optionally with a revision (``EleutherAI/pythia-160m@step143000``), a local folder in the Hugging
            Face format (llm-foundry's exported MPT models included), or a ``.gguf`` file.
        layer: The hidden state to return, as in HF ``hidden_states``: -1 and the number of blocks mean the last, after
            the final norm; smaller numbers the output of that block, and the blocks behind it are dropped.
        device: Where it runs; in bf16 on CUDA, in fp32 elsewhere.
        placement: ``"replicate"`` puts all of it on the device. ``"shard"`` leaves it in the host's memory until
            :meth:`shard`, so that the device never holds the whole.
        head: Whether to keep the LM head, for :meth:`logits`.
        trust_remote_code: Whether code that comes with the weights may run.

    Raises:
        ValueError: If there is no such model, weights are missing, it is not a causal decoder, it needs remote code,
            the layer does not exist, or the device has too little memory for it.
    """

    def __init__(
        self,
        name: str,
        *,
        layer: int = -1,
        device: torch.device | str = "cpu",
        placement: Placement = "replicate",
        head: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = name
        self._device = torch.device(device)
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        body, self._head = _load(name, dtype, trust_remote_code, head)
        body.eval().requires_grad_(False)
        self.context = _context_length(body.config)
        self.rows, width = body.get_input_embeddings().weight.shape
        self._capture = _cut(name, body, layer)
        blocks = depth(body) or 0 if self._capture is None else len(find_blocks(body)[1])
        self._attention = 4 * blocks * width  # FLOPs for one query and one key
        self.parameters = matmul_parameters(body)
        self.body = body
        if placement == "replicate":
            with self._explain_lack_of_memory("Share it out with placement: shard, or choose a smaller teacher."):
                self.body.to(self._device)
                if self._head is not None:
                    self._head = self._head.to(self._device)
            self._check_causal()

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states of the chosen layer, ``[B, S, D_t]``, without a gradient.

        A sequence longer than the teacher's context is run as consecutive windows of that length, so the first tokens
        of a window see less context (our choice, the paper is silent).

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 0 or False where there is padding. Default: ``None``, no padding.
        """
        batch, length = input_ids.shape
        window = self.context or length
        if length <= window:
            return self._run(input_ids, attention_mask)
        padded = -(-length // window) * window
        ids = nn.functional.pad(input_ids, (0, padded - length)).view(-1, window)
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (0, padded - length)).view(-1, window)
        return self._run(ids, attention_mask).view(batch, padded, -1)[:, :length]

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token logits ``[B, S, V]``, where the head was kept; arguments as for :meth:`hidden`."""
        assert self._head is not None, "built without head=True"
        return nn.functional.linear(self.hidden(input_ids, attention_mask), self._head)

    def flops(self, tokens: int, length: int) -> float:
        """FLOPs of a forward, counted as llm-foundry counts the student's for its MFU: matrices and full attention.

        Args:
            tokens: Number of token ids, padding included.
            length: Length of the sequences that they are in.
        """
        head = 0 if self._head is None else self._head.numel()
        return tokens * (2.0 * (self.parameters + head) + self._attention * min(length, self.context or length))

    def fingerprint(self) -> str:
        """A short hash over the names, shapes and bits of all parameters; to be taken before :meth:`shard`."""
        bits = {2: torch.int16, 4: torch.int32}
        content = hashlib.sha256()
        for name, p in self.body.named_parameters():
            total = p.detach().view(bits[p.element_size()]).sum(dtype=torch.int64)
            content.update(f"{name} {tuple(p.shape)} {int(total)};".encode())
        return content.hexdigest()[:12]

    def shard(self) -> None:
        """Shard the parameters over all ranks (FSDP2), moving block by block to the device.

        Every rank has to call this, and :meth:`hidden` equally often from then on.

        Raises:
            ValueError: If it is not a causal decoder, or the device has too little memory for a share of it.
        """
        from torch.distributed import get_world_size
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (get_world_size(),))
        with self._explain_lack_of_memory("Choose a smaller teacher, or use more ranks."):
            for block in find_blocks(self.body)[1]:
                fully_shard(block, mesh=mesh)
            fully_shard(self.body, mesh=mesh)
        self._check_causal()

    @torch.no_grad()
    def _run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self._capture is not None:
            self._capture.arm()
        output = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        if hasattr(self.body, "reshard"):  # a sharded root keeps its parameters gathered after a forward without grad
            self.body.reshard()
        return output.last_hidden_state if self._capture is None else self._capture.take()

    @contextmanager
    def _explain_lack_of_memory(self, remedy: str) -> Iterator[None]:
        needed = sum(p.numel() * p.element_size() for p in self.body.parameters())
        free, total = torch.cuda.mem_get_info(self._device) if self._device.type == "cuda" else (0, 0)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"teacher {self.name!r} does not fit on {self._device}: its parameters take {needed / 2**20:.1f} MiB, "
                f"and {free / 2**20:.1f} of {total / 2**20:.1f} MiB are free. {remedy}"
            ) from error

    def _check_causal(self) -> None:
        ids = torch.zeros(1, 4, dtype=torch.long, device=self._device)
        before = self._run(ids, None)[:, :-1].float()
        ids[0, -1] = 1
        change = (self._run(ids, None)[:, :-1].float() - before).abs().max()
        if change > 1e-4 * before.abs().max():
            raise ValueError(
                f"teacher {self.name!r} is not a causal decoder: its hidden states depend on later tokens and would "
                "tell the student the answers. Choose a causal language model."
            )


def build_body(name: str | PretrainedConfig, layer: int = -1, trust_remote_code: bool = False) -> Any:
    """The teacher's body on the meta device, cut like the one that runs: shapes without weights, for planning.

    Args:
        name: As in :class:`Teacher`; or a configuration, then nothing is read.
        layer: As in :class:`Teacher`.
        trust_remote_code: As in :class:`Teacher`.

    Raises:
        ValueError: If there is no such model or layer.
    """
    if isinstance(name, str):
        config: Any = _load_config(name, *_source(name, trust_remote_code))
    else:
        config, name = name, name.model_type
    with torch.device("meta"):
        if config.model_type == "mpt" and hasattr(config, "ffn_config"):
            from llmfoundry.models.mpt import MPTModel

            config.attn_config["attn_impl"] = "torch"
            config.init_device = "meta"
            body = MPTModel(config)
        else:
            body = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    _cut(name, body, layer)
    return body.eval().requires_grad_(False)


def needs_mask(attention_mask: Tensor | None) -> bool:
    """Whether a causal decoder must be told of the padding: not if all of it comes after the tokens, which then never
    attend to it.

    Without a mask attention takes its fast causal path, and transformers does not look into one, for which the host
    would wait for the device.

    Args:
        attention_mask: ``[B, S]``, 0 or False where there is padding. If it is on an accelerator already, looking into
            it would cost that wait, and the answer is yes.
    """
    if attention_mask is None:
        return False
    if attention_mask.device.type != "cpu":
        return True
    tokens = attention_mask != 0
    return bool((tokens[:, 1:] & ~tokens[:, :-1]).any())


def read_vocabulary(name: str, trust_remote_code: bool = False) -> dict[int, str] | None:
    """The teacher's vocabulary, id to token, or ``None`` if it comes without a tokenizer.

    Args:
        name: As in :class:`Teacher`.
        trust_remote_code: As in :class:`Teacher`.
    """
    if name.endswith(".gguf"):
        file = _require_path(name)
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ValueError(
                f"teacher {name!r} is a GGUF file, which needs the package gguf: pip install 'let-composer[gguf]'"
            ) from error

        tokens = GGUFReader(file).fields.get("tokenizer.ggml.tokens")
        return None if tokens is None else dict(enumerate(tokens.contents()))
    path, revision = _split_revision(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        log.info("no tokenizer of teacher %r could be read: %s", name, error)
        return None
    return {index: token for token, index in tokenizer.get_vocab().items()}


def check_vocabulary(student: Mapping[int, str], teacher: Mapping[int, str] | None, rows: int, name: str) -> None:
    """Check that the teacher understands the student's token ids.

    Args:
        student: The student's vocabulary, id to token.
        teacher: The teacher's, or ``None`` if unknown; then only the number of ids is compared.
        rows: Rows of the teacher's embedding, padding included.
        name: The teacher, for messages.

    Raises:
        ValueError: If an id means different tokens, or lies outside the teacher's embedding.
    """
    hint = "Use a teacher with the student's tokenizer, or train the student on the teacher's."
    if student and max(student) >= rows:
        raise ValueError(
            f"teacher {name!r} has embeddings for {rows} token ids, but the student's tokenizer goes up to id "
            f"{max(student)} ({student[max(student)]!r}). {hint}"
        )
    if teacher is None:
        log.warning("teacher %r comes without a tokenizer: whether its token ids mean the same is not checked.", name)
        return
    different = [index for index, token in sorted(student.items()) if index in teacher and teacher[index] != token]
    if different:
        examples = "; ".join(f"{i} is {student[i]!r} here and {teacher[i]!r} there" for i in different[:3])
        raise ValueError(
            f"teacher {name!r} has another vocabulary: {len(different)} of {len(student)} token ids differ "
            f"({examples}). {hint}"
        )
    unknown = sorted(set(student) - set(teacher))
    if unknown:
        examples = ", ".join(repr(student[i]) for i in unknown[:5])
        log.warning("teacher %r never saw %d of the student's tokens: %s.", name, len(unknown), examples)


def _load(name: str, dtype: torch.dtype, trust_remote_code: bool, head: bool) -> tuple[Any, Tensor | None]:
    """The body, and the weight of the LM head if that is wanted."""
    path, options = _source(name, trust_remote_code)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports the LM head as unused; what matters is checked below
    try:
        config = _load_config(name, path, options)
        if config.is_encoder_decoder:
            raise ValueError(
                f"teacher {name!r} is an encoder-decoder ({config.model_type}). Choose a causal language model."
            )
        from_foundry = config.model_type == "mpt" and hasattr(config, "ffn_config")
        if from_foundry:
            model, loaded = _load_foundry_mpt(path, config, dtype)
        elif head or "gguf_file" in options:  # of GGUF files transformers knows the names of the whole model only
            model, loaded = AutoModelForCausalLM.from_pretrained(
                path, torch_dtype=dtype, output_loading_info=True, **options
            )
        else:
            model, loaded = AutoModel.from_pretrained(path, torch_dtype=dtype, output_loading_info=True, **options)
    except OSError as error:
        raise ValueError(f"the weights of teacher {name!r} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := [*loaded["missing_keys"], *loaded["mismatched_keys"]]:
        raise ValueError(
            f"teacher {name!r} lacks {len(missing)} of the weights of {type(model).__name__} (for example "
            f"{missing[0]}) and would run with random ones. Is it a complete checkpoint in the Hugging Face format?"
        )
    body = model.transformer if from_foundry else model.base_model
    if not head:
        return body, None
    output = model.get_output_embeddings()
    altered = [key for key in ("logit_scale", "final_logit_softcapping") if getattr(config, key, None)]
    if altered or getattr(output, "bias", None) is not None:
        raise ValueError(
            f"teacher {name!r} does more to its logits than one matrix ({', '.join(altered) or 'a bias'}), which "
            "distillation does not support. Choose another teacher."
        )
    return body, output.weight.detach()


def _source(name: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """What from_pretrained is to be called with."""
    if name.endswith(".gguf"):
        file = _require_path(name)
        return str(file.parent), {"gguf_file": file.name}
    path, revision = _split_revision(name)
    return path, {"revision": revision, "trust_remote_code": trust_remote_code}


def _load_config(name: str, path: str, options: dict[str, Any]) -> PretrainedConfig:
    if _looks_local(path):
        _require_path(path)
    try:
        entries, _ = PretrainedConfig.get_config_dict(path, **options)
        if entries.get("model_type") == "mpt" and "ffn_config" in entries:  # exported by llm-foundry
            from llmfoundry.models.mpt import MPTConfig

            return MPTConfig.from_dict(entries)
        return AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"teacher {name!r} brings its own code, which is not run unless asked for. Read that code, then set "
                "trust_remote_code: true, or choose a teacher that transformers knows."
            ) from error
        raise ValueError(
            f"there is no teacher {name!r}: expected a model id on the hub, a folder with config.json, or a .gguf "
            f"file. On a machine without a network, give a local path. ({error})"
        ) from error


def _load_foundry_mpt(path: str, config: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    # llm-foundry exports MPT models with a copy of its own code; the installed package is that code.
    from llmfoundry.models.layers.attention import is_flash_v2_installed
    from llmfoundry.models.mpt import MPTForCausalLM

    if not (dtype == torch.bfloat16 and is_flash_v2_installed()):
        config.attn_config["attn_impl"] = "torch"
    loading: Any = MPTForCausalLM.from_pretrained(path, config=config, torch_dtype=dtype, output_loading_info=True)
    return loading


def _cut(name: str, body: Any, layer: int) -> Capture | None:
    """Drop the blocks behind ``layer``; ``None`` when the body's own output is what is wanted."""
    if layer == -1:
        return None
    blocks = find_blocks(body)[1]
    passed = blocks_passed(layer, blocks, "teacher_layer", f"teacher {name!r}")
    if passed == len(blocks):
        return None
    del blocks[passed:]
    return Capture(blocks[-1])


def _context_length(config: PretrainedConfig) -> int | None:
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(config, key, None), int):
            return length
    return None


def _split_revision(name: str) -> tuple[str, str | None]:
    if _looks_local(name):
        return os.path.expanduser(name), None
    path, _, revision = name.partition("@")  # no hub id holds one
    return path, revision or None


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)


def _require_path(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"there is no teacher at {name!r} (looked for {path.absolute()}). Check the path.")
    return path
