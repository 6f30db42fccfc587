"""Find, download and read pretrained decoders; where one cannot be read, say which file is at fault."""

import contextlib
import json
import logging
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from let_composer.student import find_blocks

__all__ = ["build", "check_files", "download", "find_file", "load", "load_config", "source", "wanted"]

log = logging.getLogger(__name__)

_TEXTS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
_PACKAGES = {"awq": "autoawq", "gptq": "gptqmodel"}  # where the package is not called like the method
_POINTER = b"version https://git-lfs"


def download(name: str) -> None:
    """Bring the files that a teacher needs into the hub's cache; nothing to do for local ones, or offline.

    Args:
        name: As in :class:`let_composer.teacher.Teacher`.
    """
    path, revision = _split_revision(name)
    if name.endswith(".gguf") or _looks_local(path) or constants.HF_HUB_OFFLINE:
        return
    try:
        files = wanted(HfApi().list_repo_files(path, revision=revision))
        snapshot_download(path, revision=revision, allow_patterns=files)
    except Exception as error:  # then the cache has it all, or loading says what is missing
        log.warning("teacher %r could not be downloaded, the hub's cache is used: %s", name, error)


def wanted(files: list[str]) -> list[str]:
    """The files of a hub repository that loading reads: the weights in one format, configuration, tokenizer, code."""
    files = [file for file in files if "/" not in file]
    weights = [file for file in files if file.startswith("model") and file.endswith(".safetensors")]
    weights = weights or [file for file in files if file.startswith("pytorch_model") and file.endswith(".bin")]
    return weights + [file for file in files if file.endswith(_TEXTS)]


def source(name: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is to be called with.

    Raises:
        ValueError: If a local path does not exist.
    """
    if name.endswith(".gguf"):
        file = _require_path(name)
        return str(file.parent), {"gguf_file": file.name}
    path, revision = _split_revision(name)
    if _looks_local(path):
        _require_path(path)
    return path, {"revision": revision, "trust_remote_code": trust_remote_code}


def find_file(name: str, file: str) -> Path | None:
    """One file of a model, from the hub if need be, or ``None`` if it has no such file."""
    path, options = source(name, False)
    if "gguf_file" in options or os.path.isdir(path):
        found = Path(path, file)
        return found if found.is_file() else None
    try:
        return Path(
            hf_hub_download(path, file, revision=options["revision"], local_files_only=constants.HF_HUB_OFFLINE)
        )
    except (OSError, ValueError):  # there is no such model or file, or no network
        return None


def check_files(name: str) -> None:
    """Open every file that loading will read.

    Raises:
        ValueError: Naming the file and its size, if it is damaged, half downloaded or a pointer of git-lfs; or the
            package that is needed to read it.
    """
    path, options = source(name, False)
    if file := options.get("gguf_file"):
        files = [Path(path, file)]
        if find_spec("gguf") is None:
            raise ValueError(
                f"teacher {name!r} is a GGUF file, which needs the package gguf: pip install 'let-composer[gguf]'"
            )
    else:
        config = find_file(name, "config.json")
        files = [] if config is None else sorted(config.parent / f for f in wanted(os.listdir(config.parent)))
    for file in files:
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
        size = f"{file.name} of teacher {name!r} ({file.stat().st_size} bytes, in {file.parent})"
        if start == _POINTER:
            raise ValueError(f"{size} is a pointer of git-lfs, not the file itself. Run git lfs pull in that folder.")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".gguf":
                from gguf import GGUFReader

                GGUFReader(file)
            elif file.suffix == ".bin" and not (zipfile.is_zipfile(file) or start.startswith(b"\x80")):
                raise ValueError("it is neither a whole archive of torch nor an old pickle")
        except (SafetensorError, ValueError, IndexError) as error:
            raise ValueError(
                f"{size} is damaged, or only half of it was downloaded: {error}. Fetch it again."
            ) from error


def load_config(name: str, trust_remote_code: bool) -> Any:
    """The model's configuration.

    Raises:
        ValueError: If there is no such model, it needs remote code, a package of its own or an adapter, or it is not a
            decoder.
    """
    path, options = source(name, trust_remote_code)
    check_files(name)
    if find_file(name, "adapter_config.json"):
        raise ValueError(
            f"teacher {name!r} is a PEFT adapter (it has adapter_config.json). Without the adapter it would be another "
            "model. Merge it into its base (merge_and_unload), save the result, and give that folder."
        )
    try:
        entries, _ = PretrainedConfig.get_config_dict(path, **options)
        config = _foundry_config(entries) if _from_foundry(entries) else AutoConfig.from_pretrained(path, **options)
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
    if method := (entries.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(
            f"teacher {name!r} is quantised with {method}, which needs the package {_PACKAGES.get(method, method)} and "
            "kernels of its own. Choose the model that it was made from."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"teacher {name!r} is an encoder-decoder ({config.model_type}). Choose a causal language model."
        )
    return config


def build(config: Any, trust_remote_code: bool) -> Any:
    """The body on the meta device: shapes without weights."""
    with torch.device("meta"):
        if not _from_foundry(config.to_dict()):
            return AutoModel.from_config(config, trust_remote_code=trust_remote_code)
        from llmfoundry.models.mpt import MPTModel

        config.attn_config["attn_impl"] = "torch"
        config.init_device = "meta"
        return MPTModel(config)


def load(name: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, head: bool) -> tuple[Any, Any]:
    """The body, and the model that it is in; that has an LM head if it is wanted.

    Args:
        name: As in :class:`let_composer.teacher.Teacher`.
        dtype: Of the weights.
        device: Where the weights go, without a stop in the host's memory.
        trust_remote_code: As in :class:`let_composer.teacher.Teacher`.
        head: Whether the LM head is wanted.

    Raises:
        ValueError: If there is no such model, or its weights are incomplete or cannot be read.
    """
    config = load_config(name, trust_remote_code)
    foundry = _from_foundry(config.to_dict())
    path, options = source(name, trust_remote_code)
    options |= {"torch_dtype": dtype, "output_loading_info": True}
    if device.type != "cpu":
        options["device_map"] = {"": device}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports the LM head as unused; what matters is checked below
    try:
        if foundry:
            model, missing = _load_foundry_mpt(path, config, options)
        elif head or "gguf_file" in options:  # of GGUF files transformers knows the names of the whole model only
            model, missing = _load(AutoModelForCausalLM, path, options)
        else:
            model, missing = _load(AutoModel, path, options)
            if missing:  # or it has other names in the body than in the whole model, as gemma3_text has
                with contextlib.suppress(ValueError):  # there may be no such class
                    whole = _load(AutoModelForCausalLM, path, options)
                    model, missing = (model, missing) if whole[1] else whole
    except (OSError, RuntimeError, EOFError, ImportError, ValueError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).partition("\nModel type should be one of")[0]  # and then come hundreds
        raise ValueError(f"the weights of teacher {name!r} cannot be loaded: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    output = model.get_output_embeddings()
    of_head = next((f"{name}." for name, module in model.named_modules() if module is output), "")
    if head and missing and of_head and all(key.startswith(of_head) for key in missing):
        raise ValueError(
            f"teacher {name!r} has no LM head: it was saved without {missing[0]}. LET's weight: auto reads the "
            "teacher's loss through it, RKD and SALT its logits. Give LET a number as weight, or choose a teacher with "
            "a head."
        )
    if missing:
        raise ValueError(
            f"teacher {name!r} lacks {len(missing)} of the weights of {type(model).__name__} (for example "
            f"{missing[0]}) and would run with random ones. Is it a complete checkpoint in the Hugging Face format?"
        )
    body = getattr(model, "transformer", model) if foundry else model.base_model
    if body is model and output is not None:  # its base_model_prefix names nothing
        body = model.get_submodule(find_blocks(model)[0].rpartition(".")[0])
    return body, model


def _load(kind: Any, path: str, options: dict[str, Any]) -> tuple[Any, list[str]]:
    model, loaded = kind.from_pretrained(path, **options)
    return model, [*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])]


def _load_foundry_mpt(path: str, config: Any, options: dict[str, Any]) -> tuple[Any, list[str]]:
    # llm-foundry exports MPT models with a copy of its own code; the installed package is that code.
    from llmfoundry.models.layers.attention import is_flash_v2_installed
    from llmfoundry.models.mpt import MPTForCausalLM

    if not (options["torch_dtype"] == torch.bfloat16 and is_flash_v2_installed()):
        config.attn_config["attn_impl"] = "torch"
    return _load(MPTForCausalLM, path, {**options, "config": config})


def _foundry_config(entries: dict[str, Any]) -> Any:
    from llmfoundry.models.mpt import MPTConfig

    config: Any = MPTConfig.from_dict(entries)
    config.attn_config["attn_uses_sequence_id"] = True  # whoever calls decides: without ids nothing changes
    return config


def _from_foundry(entries: dict[str, Any]) -> bool:
    return entries.get("model_type") == "mpt" and "ffn_config" in entries


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
