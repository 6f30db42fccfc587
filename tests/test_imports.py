"""The walls: what is loaded by what, each time in a fresh interpreter."""

import subprocess
import sys

import pytest

SHOW = "\nimport sys\nprint(' '.join(m for m in sys.modules if sys.modules[m] is not None))\n"


def imported(*steps: str) -> list[set[str]]:
    """The modules that are loaded after each of the steps."""
    program = SHOW.join([*steps, ""])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in result.stdout.splitlines()]


def test_the_package_needs_no_triton_and_the_loss_no_composer():
    package, loss = imported("import let_composer", "import let_composer.loss.kernels; let_composer.alignment_loss")
    assert not {"triton", "composer"} & package
    assert not {"composer", "llmfoundry", "streaming", "transformers"} & loss


@pytest.mark.slow
def test_training_imports_nothing_of_data_but_the_manifest_and_needs_no_triton():
    (modules,) = imported("import sys\nsys.modules['triton'] = None\nfrom let_composer import LET, RKD\nLET(), RKD()")
    data = {m for m in modules if m.startswith("let_composer.data")}
    assert data <= {"let_composer.data", "let_composer.data.manifest"}


def test_an_unknown_name_is_an_attribute_error():
    import let_composer

    with pytest.raises(AttributeError, match="has no attribute 'LETT'"):
        let_composer.LETT  # noqa: B018
