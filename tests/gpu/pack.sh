#!/usr/bin/env bash
# Gather what a GPU machine without a network lacks: bash tests/gpu/pack.sh DIR (--help for more).
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/pack.py" "$@"
