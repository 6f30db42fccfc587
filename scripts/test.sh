#!/usr/bin/env bash
# Install what the tests need and run them all, two files at a time; arguments go to pytest.
#
#   bash scripts/test.sh [-k EXPRESSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
.venv/bin/python -m pip check # the lock file has all that its packages need
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/pyright
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tensors are tiny; on a busy machine threads would wait for each other
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
