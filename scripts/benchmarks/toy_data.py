"""Shards, a tokenizer and a teacher at toy size, for the rehearsal of the GPU report: python .../toy_data.py OUT"""

import json
import pydoc_data.topics
import shlex
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from let_composer.cli import main as let_composer

END = "<|endoftext|>"


def main(out: Path) -> None:
    """Write OUT/teacher, with its tokenizer, and OUT/shards, from Python's own reference."""
    out.mkdir(parents=True, exist_ok=True)
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: Any = {"vocab_size": 512, "special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    config = LlamaConfig(512, 32, 64, 2, 2, max_position_embeddings=64)  # vocabulary, width, MLP, blocks, heads
    LlamaForCausalLM(config).save_pretrained(out / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(out / "teacher")
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Reference"}}) for text in texts]
    (out / "texts.jsonl").write_text("\n".join(lines) + "\n")
    where = [str(out / "texts.jsonl"), "--out", str(out / "shards"), "--tokenizer", str(out / "teacher")]
    let_composer(["prepare", *where, *shlex.split("--sequence-length 64 --validation 0.2 --workers 1 --quiet")])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
