"""From text to shards: sources → tokens → shards, driven by convert; training imports manifest alone."""

__all__ = ["DataError"]


class DataError(ValueError):
    """Something about the input, the output folder or the arguments that the user can put right."""
