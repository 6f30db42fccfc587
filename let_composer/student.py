"""Which module is block k of a decoder, and its output once per forward. The same for students and teachers."""

import contextlib
from typing import Any

from torch import Tensor, nn

from let_composer.balance import measured

__all__ = ["DEPTH_KEYS", "Capture", "blocks_passed", "find_blocks", "matmul_parameters", "resolve_layer"]

# Attributes under which FSDP1, activation checkpointing and torch.compile keep the module they wrap.
_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
DEPTH_KEYS = ("num_hidden_layers", "n_layers", "n_layer")  # of configurations: how many blocks there are
_ADVICE = "Name the block to use by its dotted path, for example student_layer: model.transformer.blocks.2"


def find_blocks(model: nn.Module, advice: str = _ADVICE) -> tuple[str, nn.ModuleList]:
    """Find the decoder's list of blocks by structure: the outermost ``nn.ModuleList`` of modules of one class.

    Hybrids have blocks of several classes: a list as long as the configuration says there are layers is one too. Where
    a model has several lists, the one of that length.

    Args:
        model: Any causal LM, wrapped by FSDP, activation checkpointing or torch.compile or not.
        advice: What to do where there is no telling, for the message.

    Returns:
        The dotted path of the list and the list. Its items are the outermost objects, wrappers included.

    Raises:
        ValueError: If there is no such list or no telling which one is meant.
    """
    every, expected = _lists(model).items(), _depth(model)
    as_long = [(path, blocks) for path, blocks in every if len(blocks) == expected]
    of_a_kind = [(path, blocks) for path, blocks in every if len({_kind(block) for block in blocks}) == 1]
    lists = as_long or of_a_kind
    if len(lists) == 1:
        return lists[0]
    found = ", ".join(f"{name} ({len(blocks)} x {_kind(blocks[0]).__name__})" for name, blocks in lists) or "none"
    raise ValueError(
        f"expected one list of decoder blocks in {_kind(model).__name__}, found {len(lists)}: {found}. {advice}"
    )


def blocks_passed(layer: int, blocks: nn.ModuleList, option: str, owner: str) -> int:
    """Turn the number of a hidden state into the number of blocks passed, from 1.

    Args:
        layer: As in HF ``hidden_states[layer]``; negative counts from the end, -1 being the last block.
        blocks: All blocks.
        option: The option that ``layer`` came from, for the message.
        owner: Whose blocks they are, for the message.

    Raises:
        ValueError: If there is no such block.
    """
    count = len(blocks)
    passed = layer if layer >= 0 else count + 1 + layer
    if not 1 <= passed <= count:
        raise ValueError(
            f"{option} must be between 1 and {count}, or between -{count} and -1: {owner} has {count} blocks. "
            f"Got {layer}."
        )
    return passed


def resolve_layer(model: nn.Module, layer: int | str) -> tuple[str, nn.Module]:
    """Find the module whose output is hidden state ``layer``.

    Args:
        model: Any causal LM, wrapped or not.
        layer: As for :func:`blocks_passed`, or the dotted path of a module.

    Returns:
        The module's dotted path, without the names of wrappers, and the outermost object found there.

    Raises:
        ValueError: If there is no such block or module.
    """
    if isinstance(layer, str):
        module = _modules(model).get(layer)
        if module is None:
            raise ValueError(
                f"there is no module {layer!r} in {_kind(model).__name__}. Lists of modules in it: "
                f"{', '.join(_lists(model))}."
            )
        return layer, module
    path, blocks = find_blocks(model)
    passed = blocks_passed(layer, blocks, "student_layer", f"the student's {path}")
    return f"{path}.{passed - 1}", blocks[passed - 1]


class Capture:
    """Keeps the output of one module, for the forward after ``arm`` only.

    Evaluation, generation and dry passes run the same module unarmed and leave nothing behind. The hook is on the
    outermost object of the block: activation checkpointing recomputes inside it without firing it again. A copy of the
    model, pickled ones included, has a hook that does nothing.

    Args:
        module: A decoder block; its output is a tensor ``[B, S, D]`` or a tuple that starts with one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.armed = False
        self.hidden: Tensor | None = None
        self.sink: Tensor | None = None
        self._handle = module.register_forward_hook(self)

    def arm(self, sink: Tensor | None = None) -> None:
        """Keep the output of the next forward.

        Args:
            sink: What is to hold the squared norm of the gradient that comes back to this output from the layers behind
                it; see :func:`let_composer.balance.measured`. Default: ``None``, not measured.
        """
        self.hidden = None
        self.sink = sink
        self.armed = True

    def clear(self) -> None:
        """Disarm, and let go of what was captured."""
        self.armed = False
        self.hidden = None

    def take(self) -> Tensor:
        """Hand over what was captured, ``[B, S, D]``, and disarm.

        Raises:
            RuntimeError: If the module did not run, or its output is no tensor.
        """
        hidden = self.hidden
        self.clear()
        if not isinstance(hidden, Tensor):
            raise RuntimeError(
                f"expected the captured block to return hidden states [B, S, D], got {type(hidden).__name__}. Is it "
                "part of the model's forward? Choose another block with its dotted path."
            )
        return hidden

    def remove(self) -> None:
        """Clear, and take the hook off the module."""
        self.clear()
        self._handle.remove()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook."""
        if not self.armed:
            return None
        self.hidden = hidden = output[0] if isinstance(output, tuple) else output
        if self.sink is None or not hidden.requires_grad:
            return None
        hidden = measured(hidden, self.sink)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def __reduce__(self) -> tuple[Any, ...]:  # to a function that takes anything and returns None, of the library's
        return getattr, (contextlib.nullcontext(), "__exit__")


def matmul_parameters(model: nn.Module) -> int:
    """Number of parameters that every token is multiplied with: all but the embedding tables, which are looked up.

    A tied embedding counts once, because the LM head multiplies with it. Experts of an MoE layer all count.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = [getattr(m, "get_output_embeddings", lambda: None)() for m in model.modules()]
    tied = {id(getattr(head, "weight", None)) for head in heads}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables - tied)


def _depth(model: nn.Module) -> int | None:
    """Number of blocks that the model's configuration gives, or ``None`` if it gives none."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in DEPTH_KEYS:
            if isinstance(number := getattr(config, name, None), int):
                return number
    return None


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their paths without the names of wrappers; of what is wrapped the outermost object."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # a wrapper comes before what it holds
        found.setdefault(".".join(part for part in name.split(".") if part not in _WRAPPED), module)
    return found


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules that are in no other list."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in _modules(model).items():
        if isinstance(module, nn.ModuleList) and len(module) and not path.startswith(tuple(f"{p}." for p in found)):
            found[path] = module
    return found


def _kind(module: nn.Module) -> type[nn.Module]:
    wrapped = [child for name, child in module.named_children() if name in _WRAPPED]
    return _kind(wrapped[0]) if wrapped else type(module)
