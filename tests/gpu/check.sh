#!/usr/bin/env bash
# Tests, benchmarks and a real study on this machine's GPU: bash tests/gpu/check.sh --minutes 30
# (--help for more; docs/gpu.md). $PYTHON is the interpreter that has torch; `python3` unless set.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/kit.py" "$@"
