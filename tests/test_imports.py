"""Two walls: the loss knows nothing of Composer, and importing the package needs neither Triton nor a GPU."""

import subprocess
import sys

import pytest


def imported(code: str) -> set[str]:
    """The modules that are loaded after running ``code`` in a fresh interpreter."""
    program = f"{code}\nimport sys\nprint(' '.join(m for m in sys.modules if sys.modules[m] is not None))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_loss_does_not_import_composer():
    modules = imported("import let_composer.loss.kernels\nfrom let_composer import alignment_loss")
    assert not {"composer", "llmfoundry", "streaming", "transformers"} & modules


@pytest.mark.slow
def test_training_imports_nothing_of_data_but_the_manifest():
    modules = imported("from let_composer import LET, RKD\nLET()")
    assert {m for m in modules if m.startswith("let_composer.data")} <= {
        "let_composer.data",
        "let_composer.data.manifest",
    }


def test_importing_the_package_does_not_import_triton():
    modules = imported("import let_composer")
    assert not {"triton", "composer"} & modules


@pytest.mark.slow
def test_the_algorithm_works_without_triton():
    imported("import sys\nsys.modules['triton'] = None\nfrom let_composer import LET\nLET()")


def test_an_unknown_name_is_an_attribute_error():
    import let_composer

    with pytest.raises(AttributeError, match="has no attribute 'LETT'"):
        let_composer.LETT  # noqa: B018
    assert set(let_composer.__all__) == {"LET", "RKD", "SALT", "alignment_loss"}
