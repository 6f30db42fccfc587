"""From text to shards: sources → tokens → shards, driven by convert; training imports manifest alone."""
