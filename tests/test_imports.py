"""The walls: what is loaded by what, step by step in a fresh interpreter without Triton."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import let_composer

STEPS = (
    "import sys, torch, let_composer",
    "let_composer.alignment_loss(torch.ones(2, 4, requires_grad=True), torch.ones(2, 4)).backward()",
    "sys.modules['triton'] = None; from let_composer import LET, RKD; LET(), RKD()",
)


@pytest.mark.slow
def test_the_loss_on_the_cpu_needs_torch_alone_and_training_neither_triton_nor_data_but_the_manifest():
    show = "\nprint(' '.join(name for name, module in sys.modules.items() if module))\n"
    result = subprocess.run([sys.executable, "-c", show.join([*STEPS, ""])], capture_output=True, text=True, check=True)
    package, loss, training = (set(line.split()) for line in result.stdout.splitlines())
    assert "composer" in training and package <= loss
    others = {"triton", "composer", "llmfoundry", "streaming", "transformers", "let_composer.loss.kernels"}
    assert not others & loss
    data = {name for name in training if name.startswith("let_composer.data")}
    assert data <= {"let_composer.data", "let_composer.data.manifest"}


def test_the_kernels_and_the_weights_import_no_trainer():
    """What the interpreter above does not reach."""
    package = Path(let_composer.__file__).parent
    for file in [*package.glob("loss/*.py"), package / "balance.py"]:
        for name in re.findall(r"(?m)^\s*(?:from|import) ([\w.]+)", file.read_text()):
            assert name.partition(".")[0] not in {"composer", "llmfoundry", "transformers"}, file
            assert not name.startswith("let_composer") or re.match(r"let_composer\.(loss|balance)", name), file


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'LETT'"):
        let_composer.LETT  # noqa: B018
