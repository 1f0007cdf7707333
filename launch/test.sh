#!/usr/bin/env bash
# Set-up with the test tools, then every check; all of them run, and the exit code is 1 if any failed.
#   launch/test.sh [--quick | --faults] [pytest arguments]
# --quick leaves out the tests that start Ray, vLLM or DeepSpeed.
# --faults runs the tests marked `faults` and nothing else, one after the other. All other runs leave them out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=false faults=false
case ${1:-} in
--quick) quick=true && shift ;;
--faults) faults=true && shift ;;
esac
launch/setup.sh --dev
failed=()
check() { # NAME COMMAND... ; the exit code is the command's
  local name=$1 start=$SECONDS code=0
  shift
  printf '== %s\n' "$name"
  "$@" || code=$?
  if ((code)); then
    printf '== %s FAILED (exit code %s) in %s s\n' "$name" "$code" "$((SECONDS - start))"
  else
    printf '== %s passed in %s s\n' "$name" "$((SECONDS - start))"
  fi
  return "$code"
}
if $faults; then
  check 'pytest of faults' .venv/bin/python -m pytest -m faults "$@"
  exit
fi
check 'ruff check' .venv/bin/ruff check . || failed+=('ruff check')
check 'ruff format' .venv/bin/ruff format --check . || failed+=('ruff format')

# pyright uses one core, and not all of the time: it runs beside the first tests, and is shown after them.
types=$(mktemp)
check pyright .venv/bin/pyright >"$types" 2>&1 &
pyright=$!
trap 'kill "$pyright" 2>/dev/null || true; rm -f "$types"' EXIT
if (($#)); then
  $quick && set -- -m 'not engines' "$@"
  check pytest .venv/bin/python -m pytest "$@" || failed+=(pytest)
else
  name='pytest without engines'
  check "$name" .venv/bin/python -m pytest -n auto --maxprocesses 4 -m 'not engines' || failed+=("$name")
fi
wait "$pyright" || failed+=(pyright)
cat "$types"

if ((! $#)) && ! $quick; then
  # What starts engines waits for half of the time, mostly for processes that start: two run side by side. Tests that
  # share an engine or a run stay together (tests/conftest.py), in the order in which they are collected.
  name='pytest with engines'
  check "$name" .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m engines || failed+=("$name")
fi

if ((${#failed[@]})); then
  printf 'test: FAILED: %s (%s s in all)\n' "$(IFS=,; echo "${failed[*]}")" "$SECONDS"
  exit 1
fi
(($#)) || printf 'test: left out: the tests marked faults (launch/test.sh --faults)\n'
printf 'test: all passed in %s s\n' "$SECONDS"
