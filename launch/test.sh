#!/usr/bin/env bash
# Set-up with the test tools, then every check; all of them run, and the exit code is 1 if any failed.
#   launch/test.sh [--quick] [pytest arguments]
# --quick leaves out the tests that start Ray, vLLM or DeepSpeed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=false
if [[ ${1:-} == --quick ]]; then
  quick=true
  shift
fi
launch/setup.sh --dev
failed=()
check() { # NAME COMMAND...
  local name=$1 start=$SECONDS
  shift
  printf '== %s\n' "$name"
  if "$@"; then
    printf '== %s passed in %s s\n' "$name" "$((SECONDS - start))"
  else
    printf '== %s FAILED (exit code %s) in %s s\n' "$name" "$?" "$((SECONDS - start))"
    failed+=("$name")
  fi
}
check 'ruff check' .venv/bin/ruff check .
check 'ruff format' .venv/bin/ruff format --check .
check pyright .venv/bin/pyright
# Tests without engines use one core each and run side by side; an engine uses all cores.
if (($#)); then
  $quick && set -- -m 'not engines' "$@"
  check pytest .venv/bin/python -m pytest "$@"
else
  check 'pytest without engines' .venv/bin/python -m pytest -n auto --maxprocesses 4 -m 'not engines'
  $quick || check 'pytest with engines' .venv/bin/python -m pytest -m engines
fi

if ((${#failed[@]})); then
  printf 'test: FAILED: %s (%s s in all)\n' "$(IFS=,; echo "${failed[*]}")" "$SECONDS"
  exit 1
fi
printf 'test: all passed in %s s\n' "$SECONDS"
