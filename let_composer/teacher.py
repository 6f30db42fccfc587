"""Load, check, freeze, place and run the teacher: the body of a small pretrained decoder."""

import contextlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor
from transformers import PretrainedConfig

from let_composer.masks import block_diagonal, positions
from let_composer.pretrained import build, load, load_config, locate
from let_composer.ranks import check_same, everywhere
from let_composer.student import DEPTH_KEYS, Capture, blocks_passed, find_blocks, matmul_parameters
from let_composer.teacher_checks import check_causal, check_finite, check_head, fingerprint, separates_documents
from let_composer.vocabulary import check_vocabulary, read_vocabulary

__all__ = ["Placement", "Teacher", "build_body", "load_teacher"]

Placement = Literal["replicate", "shard"]


class Teacher:
    """A frozen decoder body that turns token ids into hidden states.

    It belongs to no other module, so it is in nobody's checkpoint, optimizer, wrapping or export. Most families run
    without a synchronisation with the host (a test counts). With OPT, Mixtral, dynamic and longrope RoPE the host
    reads from the device in every forward; with any family where padding stands in front.

    Args:
        name: Hub id, optionally with a revision (``EleutherAI/pythia-160m@step143000``), a local folder in the Hugging
            Face format (llm-foundry's exported MPT models included), or a ``.gguf`` file.
        layer: The hidden state to return, as in HF ``hidden_states``: -1 and the number of blocks mean the last, after
            the final norm; smaller numbers the output of that block, and the blocks behind it are dropped.
        device: Where it runs; in bf16 on CUDA, in fp32 elsewhere.
        placement: ``"replicate"`` loads it straight to the device. ``"shard"`` leaves it in the host's memory until
            :meth:`shard`, so that the device never holds the whole.
        head: Whether to keep the LM head, for :meth:`project`. A tied one is held once.
        trust_remote_code: Whether code that comes with the weights may run.
        check: Whether to check it before it is placed, on the CPU and in fp32; for another device it is loaded once
            more for that. Default: ``True``.

    Attributes:
        fingerprint: A short hash over the names, shapes and values of the body's parameters, the same on any device.
        parameters: Number of parameters of the body that every token is multiplied with.
        head_parameters: The same of the LM head, 0 where it was not kept.
        separates_documents: Whether :meth:`hidden` takes ``sequence_id``; known where it was checked.

    Raises:
        ValueError: If there is no such model, weights are missing, damaged or not finite, it is not a causal decoder,
            it needs remote code, its logits are not those of one matrix, the layer does not exist, or the device has
            too little memory for it.
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
        check: bool = True,
    ) -> None:
        self.name = name
        self._device = torch.device(device)
        cuda = self._device.type == "cuda"
        self.separates_documents = False
        if check and cuda:
            on_cpu = {"layer": layer, "head": head, "trust_remote_code": trust_remote_code}
            self.separates_documents = Teacher(name, **on_cpu).separates_documents
        target = self._device if placement == "replicate" else torch.device("cpu")
        with self._explain_lack_of_memory(
            lambda: build_body(name, layer, trust_remote_code),
            "Share it out with placement: shard, or choose a smaller teacher.",
        ):
            dtype = torch.bfloat16 if cuda else torch.float32
            body, model = load(name, dtype, target, trust_remote_code, head)
        model.eval().requires_grad_(False)
        lengths = (getattr(body.config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
        self.context = next((length for length in lengths if isinstance(length, int)), None)
        self.rows = body.get_input_embeddings().weight.shape[0]
        self._capture = _cut(name, body, layer)
        self.body = body
        self._takes = inspect.signature(body.forward).parameters.keys()
        output = model.get_output_embeddings() if head else None
        self._head = [] if output is None else [output.weight.detach(), getattr(output, "bias", None)]
        self.parameters = matmul_parameters(body)
        self.head_parameters = sum(p.numel() for p in self._head if p is not None)
        self.fingerprint = fingerprint(body.named_parameters())
        if check and not cuda:
            check_finite(name, model if head else body)
            check_causal(self)
            if head:
                check_head(self, model)
            self.separates_documents = separates_documents(self)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, sequence_id: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the chosen layer, ``[B, S, D_t]``, without a gradient.

        A sequence longer than the teacher's context is run as consecutive windows of that length, so the first tokens
        of a window see less context (our choice, the paper is silent).

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 0 or False where there is padding. Default: ``None``, no padding.
            sequence_id: ``[B, S]``, another number for every document of a packed row: none sees another, and
                positions start anew with each. Default: ``None``, all of a row is one document.

        Raises:
            ValueError: If there is a ``sequence_id`` and this teacher cannot separate documents.
        """
        batch, length = input_ids.shape
        if sequence_id is not None:
            self.require_separation(length)
        window = self.context or length
        if length <= window:
            return self._run(input_ids, attention_mask, sequence_id)
        padded = -(-length // window) * window

        def cut(x: Tensor) -> Tensor:
            return F.pad(x, (0, padded - length)).view(-1, window)

        mask, documents = (None if x is None else cut(x) for x in (attention_mask, sequence_id))
        hidden = self._run(cut(input_ids), mask, documents)
        return hidden.view(batch, padded, -1)[:, :length]

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """The logits ``[..., V]`` of last hidden states ``[..., D_t]``, where the head was kept: any part of them."""
        assert self._head, "built without head=True"
        weight, bias = self._head
        assert weight is not None
        return F.linear(hidden, weight, bias)

    def require_separation(self, length: int) -> None:
        """Refuse to go on where documents in rows of ``length`` tokens are to be separated, and this teacher cannot.

        Raises:
            ValueError: If it cannot.
        """
        window = getattr(self.body.config, "sliding_window", None) or length
        if not self.separates_documents or window < length:
            raise ValueError(
                f"teacher {self.name!r} ({type(self.body).__name__}) cannot separate the documents of a packed row of "
                f"{length} tokens. Choose another teacher, or let documents attend across (attn_uses_sequence_id: "
                "false)."
            )

    def shard(self) -> None:
        """Shard the parameters over the ranks of each node (FSDP2), moving block by block to the device.

        Every rank has to call this, and :meth:`hidden` equally often from then on. A head stays whole on each rank.

        Raises:
            ValueError: If the device has too little memory for a share of it.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        local = dist.get_local_world_size()
        nodes = dist.get_world_size() // local
        mesh = init_device_mesh(self._device.type, (nodes, local), mesh_dim_names=("node", "local"))["local"]
        with self._explain_lack_of_memory(lambda: self.body, "Choose a smaller teacher, or use more ranks."):
            self._head = [None if p is None else p.detach().clone().to(self._device) for p in self._head]
            for block in find_blocks(self.body)[1]:
                fully_shard(block, mesh=mesh)
            fully_shard(self.body, mesh=mesh)

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None, sequence_id: Tensor | None) -> Tensor:
        if sequence_id is not None:
            return self.packed(input_ids, sequence_id, attention_mask)
        inputs = {"attention_mask": attention_mask}
        counts_itself = "sequence_id" in self._takes  # llm-foundry's MPT
        if attention_mask is not None and "position_ids" in self._takes and not counts_itself:
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self._forward(input_ids, inputs)

    def packed(self, input_ids: Tensor, sequence_id: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As :meth:`hidden` with ``sequence_id``, without asking whether the teacher can, and in one window."""
        index = positions(sequence_id, attention_mask)
        inputs: dict[str, Tensor | None] = {"position_ids": index} if "position_ids" in self._takes else {}
        if "sequence_id" in self._takes:  # llm-foundry's MPT
            inputs["sequence_id"] = (index == 0).cumsum(-1) - 1
        else:
            inputs["attention_mask"] = block_diagonal(index, next(self.body.parameters()).dtype)
        return self._forward(input_ids, inputs)

    @torch.no_grad()
    def _forward(self, input_ids: Tensor, inputs: Mapping[str, Tensor | None]) -> Tensor:
        if self._capture is not None:
            self._capture.arm()
        options = {"use_cache": False} if "use_cache" in self._takes else {}
        output = self.body(input_ids=input_ids, **options, **inputs)
        if hasattr(self.body, "reshard"):  # a sharded root keeps its parameters gathered after a forward without grad
            self.body.reshard()
        return output.last_hidden_state if self._capture is None else self._capture.take()

    @contextlib.contextmanager
    def _explain_lack_of_memory(self, body: Callable[[], Any], remedy: str) -> Iterator[None]:
        free, total = torch.cuda.mem_get_info(self._device) if self._device.type == "cuda" else (0, 0)
        try:
            yield
        except torch.OutOfMemoryError as error:
            needed = sum(p.numel() for p in body().parameters()) * (2 if self._device.type == "cuda" else 4)
            raise ValueError(
                f"teacher {self.name!r} does not fit on {self._device}: its parameters take {needed / 2**20:.1f} MiB, "
                f"and {free / 2**20:.1f} of {total / 2**20:.1f} MiB are free. {remedy}"
            ) from error


def load_teacher(
    name: str,
    vocabulary: Mapping[int, str],
    *,
    placement: Placement = "replicate",
    trust_remote_code: bool = False,
    **options: Any,
) -> Teacher:
    """A teacher on every rank: downloaded once a node, checked once a node, the same everywhere. All ranks call this.

    Only the download is waited for, by looking for a file and without a time limit within a node. What goes wrong on
    one rank is raised on all.

    Args:
        name, placement, trust_remote_code, options: As in :class:`Teacher`; here ``"shard"`` shards it at once.
        vocabulary: The student's, id to token; empty if unknown.

    Raises:
        ValueError: As :class:`Teacher`, if the vocabularies differ, or if the ranks have different teachers.
    """
    first = dist.get_local_rank() == 0
    if dist.get_world_size() > 1:
        # Composer gives every node the same file name: those that share a folder for temporary files need their own.
        folder = f"{tempfile.gettempdir()}/let-composer-{os.getuid()}-node{dist.get_node_rank()}"
        with dist.busy_wait_for_local_rank_zero(folder), contextlib.suppress(Exception):  # start raises it everywhere
            if first:
                locate(name)

    def start() -> Teacher:
        theirs = read_vocabulary(name, trust_remote_code)
        teacher = Teacher(name, placement=placement, trust_remote_code=trust_remote_code, check=first, **options)
        check_vocabulary(vocabulary, theirs, teacher.rows, name)
        return teacher

    teacher = everywhere(name, start)
    head_mark = fingerprint(("", p) for p in teacher._head if p is not None)
    found = dist.all_gather_object((f"{teacher.fingerprint}-{head_mark}", teacher.separates_documents))
    check_same(name, [mark for mark, _ in found])
    teacher.separates_documents = any(can for _, can in found)
    if placement == "shard":
        everywhere(name, teacher.shard)
    return teacher


def build_body(name: str | PretrainedConfig, layer: int = -1, trust_remote_code: bool = False) -> Any:
    """The teacher's body on the meta device, cut like the one that runs: shapes without weights, for planning.

    Args:
        name: As in :class:`Teacher`; or a configuration, then nothing is read.
        layer, trust_remote_code: As there.

    Raises:
        ValueError: If there is no such model or layer.
    """
    config: Any = load_config(name, trust_remote_code, weights=False) if isinstance(name, str) else name
    body = build(config, trust_remote_code)
    _cut(name if isinstance(name, str) else config.model_type, body, layer)
    return body.eval().requires_grad_(False)


def _cut(name: str, body: Any, layer: int) -> Capture | None:
    """Drop the blocks behind ``layer``; ``None`` when the body's own output is what is wanted."""
    if layer == -1:
        return None
    blocks = find_blocks(body, f"Of teacher {name!r} only the last layer can be used: leave out teacher_layer.")[1]
    passed = blocks_passed(layer, blocks, "teacher_layer", f"teacher {name!r}")
    if passed == len(blocks):
        return None
    del blocks[passed:]
    for key in DEPTH_KEYS:
        if hasattr(body.config, key):
            setattr(body.config, key, passed)
    return Capture(blocks[-1])
