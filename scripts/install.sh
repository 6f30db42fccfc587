#!/usr/bin/env bash
# Create .venv with the locked dependencies and this package. Quick when it is up to date.
#
#   bash scripts/install.sh
#
# PYTHON=python3.12 chooses the interpreter (3.10 to 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/installed-$(cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.12 python3.11 python3.10 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "expected Python 3.10, 3.11 or 3.12, as Composer and llm-foundry need; found none. Install one, or set PYTHON." >&2
  exit 1
fi
[ -e .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
touch "$stamp"
