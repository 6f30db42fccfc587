"""The walls: what is loaded by what, step by step in a fresh interpreter without Triton."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import let_composer

STEPS = ("import let_composer", "let_composer.alignment_loss", "from let_composer import LET, RKD; LET(), RKD()")


@pytest.mark.slow
def test_the_loss_needs_no_composer_and_training_nothing_of_data_but_the_manifest():
    show = "\nprint(' '.join(m for m in sys.modules if sys.modules[m] is not None))\n"
    program = "import sys\nsys.modules['triton'] = None\n" + show.join([*STEPS, ""])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    package, loss, training = (set(line.split()) for line in result.stdout.splitlines())
    assert not {"composer", "llmfoundry", "streaming", "transformers"} & (package | loss)
    data = {m for m in training if m.startswith("let_composer.data")}
    assert data <= {"let_composer.data", "let_composer.data.manifest"}


def test_the_kernels_and_the_weights_import_no_trainer():
    """What the interpreter above does not reach."""
    for file in [
        *Path(let_composer.__file__).parent.glob("loss/*.py"),
        Path(let_composer.__file__).with_name("balance.py"),
    ]:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        ours = {name for name in names if name.startswith("let_composer")}
        assert not {"composer", "llmfoundry", "transformers"} & {name.partition(".")[0] for name in names}, file
        assert all(name.startswith(("let_composer.loss", "let_composer.balance")) for name in ours), file


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'LETT'"):
        let_composer.LETT  # noqa: B018
