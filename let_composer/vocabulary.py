"""Whether a teacher's token ids mean the student's tokens."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer

from let_composer.pretrained import locate

__all__ = ["check_vocabulary", "read_vocabulary", "student_vocabulary"]

log = logging.getLogger(__name__)

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def student_vocabulary(model: Any) -> dict[int, str]:
    """The vocabulary of a model that has a tokenizer, id to token; empty, with a warning, where it has none."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        log.warning("the student's model has no tokenizer: whether the teacher shares its token ids is not checked.")
        return {}
    return {index: token for token, index in tokenizer.get_vocab().items()}


def read_vocabulary(name: str, trust_remote_code: bool = False) -> dict[int, str] | None:
    """The teacher's vocabulary, id to token, or ``None`` if it comes without a tokenizer.

    Args:
        name, trust_remote_code: As in :class:`let_composer.teacher.Teacher`.

    Raises:
        ValueError: If there is a tokenizer that cannot be read.
    """
    folder, options = locate(name, trust_remote_code)
    if "gguf_file" in options:
        from gguf import GGUFReader

        tokens = GGUFReader(folder / options["gguf_file"]).fields.get("tokenizer.ggml.tokens")
        return None if tokens is None else dict(enumerate(tokens.contents()))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the tokenizers library raises nothing narrower
        if found := [file for file in _FILES if (folder / file).is_file()]:
            raise ValueError(
                f"the tokenizer of teacher {name!r} cannot be read, so nobody knows whether its token ids mean the "
                f"student's tokens. It has {', '.join(found)}. Is one damaged, or a package missing? ({error})"
            ) from error
        log.info("no tokenizer of teacher %r could be read: %s", name, error)
        return None
    return {index: token for token, index in tokenizer.get_vocab().items()}


def check_vocabulary(student: Mapping[int, str], teacher: Mapping[int, str] | None, rows: int, name: str) -> None:
    """Check that the teacher understands the student's token ids.

    Args:
        student: The student's vocabulary, id to token.
        teacher: The teacher's, or ``None`` if unknown; then only the number of ids is compared.
        rows: Rows of the teacher's embedding, padding included.
        name: The teacher, for messages.

    Raises:
        ValueError: If an id means different tokens, or lies outside the teacher's embedding.
    """
    hint = "Use a teacher with the student's tokenizer, or train the student on the teacher's."
    if student and max(student) >= rows:
        raise ValueError(
            f"teacher {name!r} has embeddings for {rows} token ids, but the student's tokenizer goes up to id "
            f"{max(student)} ({student[max(student)]!r}). {hint}"
        )
    if teacher is None:
        log.warning("teacher %r comes without a tokenizer: whether its token ids mean the same is not checked.", name)
        return
    different = [index for index, token in sorted(student.items()) if index in teacher and teacher[index] != token]
    if different:
        examples = "; ".join(f"{i} is {student[i]!r} here and {teacher[i]!r} there" for i in different[:3])
        raise ValueError(
            f"teacher {name!r} has another vocabulary: {len(different)} of {len(student)} token ids differ "
            f"({examples}). {hint}"
        )
    unknown = sorted(set(student) - set(teacher))
    if unknown:
        examples = ", ".join(repr(student[i]) for i in unknown[:5])
        log.warning("teacher %r never saw %d of the student's tokens: %s.", name, len(unknown), examples)
