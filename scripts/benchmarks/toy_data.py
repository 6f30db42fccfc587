"""Shards and a teacher of random tokens, for the rehearsal of the GPU report: python .../toy_data.py OUT"""

import sys
from pathlib import Path

import numpy as np
from streaming import MDSWriter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH = 512, 64


def main(out: Path) -> None:
    """Write OUT/teacher, with its tokenizer, and OUT/shards."""
    config = LlamaConfig(VOCABULARY, 32, 64, 2, 2, max_position_embeddings=LENGTH)  # then width, MLP, blocks, heads
    LlamaForCausalLM(config).save_pretrained(out / "teacher")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    tokenizer.save_pretrained(out / "teacher")
    generator, columns = np.random.default_rng(0), {"tokens": f"ndarray:uint16:{LENGTH}"}
    for split, samples in (("train", 400), ("val", 100)):
        # Not by let-composer prepare, whose backports.zstd is not on every machine with a GPU.
        with MDSWriter(out=str(out / "shards" / split), columns=columns, exist_ok=True) as writer:
            for row in generator.integers(0, VOCABULARY, (samples, LENGTH), np.uint16):
                writer.write({"tokens": row})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
