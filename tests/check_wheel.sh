#!/usr/bin/env bash
# Install the built wheel into an environment of its own, outside the checkout, and import every module.
# Usage: tests/check_wheel.sh DIST_FOLDER PYTHON
set -euo pipefail
dist=$(realpath "$1")
pins=$(realpath "$(dirname "$0")/../constraints.txt")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$2" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -c "$pins" "$(ls -t "$dist"/memopt-*.whl | head -n 1)[report]"
cd "$work"
"$work/venv/bin/python" -W error - <<'PYTHON'
import importlib
import pkgutil

import memopt

names = [m.name for m in pkgutil.walk_packages(memopt.__path__, "memopt.") if ".integrations." not in m.name]
for name in names:
    importlib.import_module(name)
for name in memopt.__all__:
    getattr(memopt, name)
print(f"wheel {memopt.__version__}: {len(names)} modules imported")
PYTHON
"$work/venv/bin/memopt" --help > /dev/null
