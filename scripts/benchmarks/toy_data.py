"""Shards, a tokenizer and a teacher at toy size, for the rehearsal of the GPU report: python .../toy_data.py OUT"""

import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
LENGTH = 64


def main(out: Path) -> None:
    """Write OUT/teacher, with its tokenizer, and OUT/shards, from Python's own reference."""
    out.mkdir(parents=True, exist_ok=True)
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: Any = {"vocab_size": 512, "special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    config = LlamaConfig(512, 32, 64, 2, 2, max_position_embeddings=LENGTH)  # vocabulary, width, MLP, blocks, heads
    LlamaForCausalLM(config).save_pretrained(out / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(out / "teacher")
    tokens = [token for text in texts for token in (*bpe.encode(text).ids, bpe.token_to_id(END))]
    rows = np.array(tokens[: len(tokens) // LENGTH * LENGTH], np.uint16).reshape(-1, LENGTH)
    held_out, columns = len(rows) // 5, {"tokens": f"ndarray:uint16:{LENGTH}"}
    for split, samples in (("train", rows[held_out:]), ("val", rows[:held_out])):
        # Not by let-composer prepare, whose backports.zstd is not on every machine with a GPU.
        with MDSWriter(out=str(out / "shards" / split), columns=columns, exist_ok=True) as writer:
            for sample in samples:
                writer.write({"tokens": sample})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
