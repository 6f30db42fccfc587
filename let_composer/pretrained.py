"""Find, download and read pretrained decoders; where one cannot be read, say which file is at fault."""

import contextlib
import functools
import json
import logging
import zipfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import TRANSFORMERS_CACHE

from let_composer.student import find_blocks

__all__ = ["build", "load", "load_config", "locate", "wanted"]

log = logging.getLogger(__name__)

# Weights in any format, and what is for people to look at.
_NOT_READ = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pt", ".pth", ".ckpt", ".npz")
_NOT_READ += (".tflite", ".zip", ".gz", ".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".mp4", ".gitattributes")
_PACKAGES = {"awq": "autoawq", "gptq": "gptqmodel"}  # where the package is not called like the method
_POINTER = b"version https://git-lfs"


def locate(name: str, trust_remote_code: bool = False, weights: bool = True) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, of which every file can be opened, and what else ``from_pretrained`` is to be told.

    Of a hub model it is in the hub's cache, which is filled first where there is a network.

    Args:
        name, trust_remote_code: As in :class:`let_composer.teacher.Teacher`.
        weights: Whether the weights are to be downloaded, too. Default: ``True``.

    Raises:
        ValueError: If there is no such model, or the package to read it; or naming the file and its size, if one is
            damaged, half downloaded or a pointer of git-lfs.
    """
    path = Path(name).expanduser()
    gguf = name.endswith(".gguf")
    if not name or not path.exists():
        if gguf or name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") > 1:
            raise ValueError(f"there is no teacher at {name!r} (looked for {path.absolute()}). Check the path.")
        path = _fetch(name, weights)
    if gguf:
        if find_spec("gguf") is None:
            raise ValueError(
                f"teacher {name!r} is a GGUF file, which needs the package gguf: pip install 'let-composer[gguf]'"
            )
        files, folder, options = [path], path.parent, {"gguf_file": path.name}
    else:
        files = sorted(path / file for file in wanted(file.name for file in path.glob("*") if file.is_file()))
        folder, options = path, {"trust_remote_code": trust_remote_code}
    for file in files:
        _check_file(file, name)
    return folder, options


def wanted(files: Iterable[str]) -> list[str]:
    """The files of a model that loading may read: its weights in one format, and whatever its code may ask for."""
    files = [file for file in files if "/" not in file]
    safe = [f for f in files if f.endswith(".safetensors") and not f.startswith(("adapter", "consolidated"))]
    weights = [file for file in safe if file.startswith("model")]
    if not weights and "model.safetensors.index.json" in files:
        weights = safe  # whatever the index calls them
    weights = weights or [file for file in files if file.startswith("pytorch_model") and file.endswith(".bin")]
    return weights + [file for file in files if not file.endswith(_NOT_READ)]


@functools.cache
def _fetch(name: str, weights: bool) -> Path:
    repository, _, revision = name.partition("@")  # no hub id holds one
    repo: dict[str, Any] = {"repo_id": repository, "revision": revision or None, "cache_dir": TRANSFORMERS_CACHE}
    files: list[str] = []
    try:
        if constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(**repo, local_files_only=True))
        files = wanted(HfApi().list_repo_files(repository, revision=revision or None))
        files = files if weights else [file for file in files if not file.endswith(_NOT_READ)]
        return Path(snapshot_download(**repo, allow_patterns=files))
    except Exception as error:
        cached = None
        with contextlib.suppress(OSError, ValueError):
            cached = Path(snapshot_download(**repo, local_files_only=True))
        if cached is None:
            raise _missing(name, error) from error
        if lacking := [file for file in files if not (cached / file).exists()]:
            came = f"teacher {name!r} came in part, without {', '.join(lacking)} ({error})"
            raise ValueError(f"{came}. Start again: what has come is kept.") from error
        if dist.get_local_rank() == 0:
            log.warning("teacher %r could not be downloaded, the hub's cache is used: %s", name, error)
        return cached


def _missing(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"there is no teacher {name!r}: expected a model id on the hub, a folder with config.json, or a .gguf file. On "
        f"a machine without a network, give a local path. ({error})"
    )


def _check_file(file: Path, name: str) -> None:
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
        raise ValueError(f"{size} is damaged, or only half of it was downloaded: {error}. Fetch it again.") from error


def load_config(name: str, trust_remote_code: bool, weights: bool = True) -> Any:
    """The model's configuration; the arguments are those of :func:`locate`.

    Raises:
        ValueError: As :func:`locate`; or if it needs remote code, a package of its own or an adapter, or is not a
            decoder.
    """
    folder, options = locate(name, trust_remote_code, weights)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"teacher {name!r} is a PEFT adapter (it has adapter_config.json). Without the adapter it would be another "
            "model. Merge it into its base (merge_and_unload), save the result, and give that folder."
        )
    try:
        entries, _ = PretrainedConfig.get_config_dict(folder, **options)
        if _from_foundry(entries):
            from llmfoundry.models.mpt import MPTConfig

            config: Any = MPTConfig.from_dict(entries)
            config.attn_config["attn_uses_sequence_id"] = True  # whoever calls decides: without ids nothing changes
        else:
            config = AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"teacher {name!r} brings its own code, which is not run unless asked for. Read that code, then set "
                "trust_remote_code: true, or choose a teacher that transformers knows."
            ) from error
        raise _missing(name, error) from error
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

    The weights go to ``device`` without a stop in the host's memory.

    Raises:
        ValueError: As :func:`load_config`, or if the weights are incomplete or cannot be read.
    """
    config = load_config(name, trust_remote_code)
    folder, options = locate(name, trust_remote_code)
    if _from_foundry(config.to_dict()):  # its export has a copy of llm-foundry's code: the installed package is that
        from llmfoundry.models.layers.attention import is_flash_v2_installed
        from llmfoundry.models.mpt import MPTForCausalLM

        if not (dtype == torch.bfloat16 and is_flash_v2_installed()):
            config.attn_config["attn_impl"] = "torch"
        options["config"] = config
        kinds = [MPTForCausalLM]
    elif head or "gguf_file" in options:  # of GGUF files transformers knows the names of the whole model only
        kinds = [AutoModelForCausalLM]
    else:
        kinds = [AutoModel, AutoModelForCausalLM]
    options |= {"torch_dtype": dtype, "output_loading_info": True}
    if device.type != "cpu":
        options["device_map"] = {"": device}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports the LM head as unused; what matters is checked below
    try:
        model, missing = _load(kinds[0], folder, options)
        if missing and len(kinds) > 1:  # or its body has other names than in the whole model, as gemma3_text has
            with contextlib.suppress(ValueError):  # there may be no such class
                whole = _load(kinds[1], folder, options)
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
    body = model.base_model
    if body is model and output is not None:  # its base_model_prefix names nothing
        body = model.get_submodule(find_blocks(model)[0].rpartition(".")[0])
    return body, model


def _load(kind: Any, folder: Path, options: dict[str, Any]) -> tuple[Any, list[str]]:
    model, loaded = kind.from_pretrained(folder, **options)
    return model, [*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])]


def _from_foundry(entries: dict[str, Any]) -> bool:
    return entries.get("model_type") == "mpt" and "ffn_config" in entries
