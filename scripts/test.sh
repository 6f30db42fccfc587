#!/usr/bin/env bash
# Install what the tests need and run them all; arguments go to pytest.
#
#   bash scripts/test.sh [-k EXPRESSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/pyright
exec .venv/bin/python -m pytest "$@"
