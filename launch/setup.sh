#!/usr/bin/env bash
# Makes .venv in the repository root from the pinned lists beside this file, and installs rlhf_dist into it.
#   launch/setup.sh [cpu|gpu] [--dev]
# Without a kind: the kind .venv already has, else gpu when nvidia-smi answers, else cpu. --dev adds what the tests need.
# PYTHON=/path/to/python3 names the interpreter. Exit code 0 ready, 1 an install failed, 2 bad input or something missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly STATE=.venv/setup # marks a .venv as made here: kind, log, and one stamp per finished part
readonly LOG=$STATE/log
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*"; }

fail() { # CODE MESSAGE...
  local code=$1
  shift
  printf 'setup: %s\n' "$@" >&2
  exit "$code"
}

stamp_of() { # the state of a finished part: its kind, the place (a moved .venv is broken) and its inputs
  local inputs=("${@:2}")
  printf '%s %s %s\n' "$1" "$(cat "${inputs[@]}" | sha256sum | cut -c1-32)" "$PWD"
}

is_done() { [[ -f $STATE/$1 && "$(<"$STATE/$1")" == "$2" ]]; } # PART STAMP

find_python() { # prints the first usable interpreter of Python 3.11 to 3.13
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    [[ -z ${PYTHON:-} ]] || break
  done
  [[ -z ${PYTHON:-} ]] || fail 2 "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13."
  fail 2 "Python 3.11, 3.12 or 3.13 is needed; found none as python3.11, python3.12, python3.13 or python3." \
    "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv) or name one: PYTHON=/path/to/python3.11 $0"
}

check_machine() { # KIND PYTHON
  local kind=$1 python=$2 need=5 old=0 free name
  [[ $kind == cpu ]] || need=20
  name=$(basename "$python")
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail 2 "$python cannot make environments: its venv and ensurepip modules are missing (Debian, Ubuntu: apt install $name-venv)."
  if [[ $kind == cpu ]] && ! "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    fail 2 "the system library libnuma.so.1 is missing; vLLM's CPU backend needs it (Debian, Ubuntu: apt install libnuma1)."
  fi
  [[ ! -d .venv ]] || old=$(du -sk .venv | cut -f1)
  free=$((($(df -Pk . | awk 'NR == 2 {print $4}') + old) / 1024 / 1024))
  ((free >= need)) || fail 2 "not enough disk in $PWD: the $kind environment needs about $need GiB, $free GiB are free."
  say "disk: about $need GiB needed, $free GiB free"
  command -v cc >/dev/null || command -v gcc >/dev/null ||
    say "note: no C compiler here. Not needed to install; compiled decoding (rollout.enforce_eager=false) and GPU kernels need one (apt install g++)."
  if [[ $kind != cpu ]]; then
    # Triton compiles its launchers against Python's header when the first kernel runs; vLLM needs them on any GPU.
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
      fail 2 "Python.h of $python is missing; GPU kernels are compiled against it (Debian, Ubuntu: apt install $name-dev)."
    note_driver
  fi
}

note_driver() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || driver=
  if [[ -z $driver ]]; then
    say "note: nvidia-smi does not answer here; the GPU environment is made, but will not find a GPU on this machine."
  elif ((${driver%%.*} < 580)); then
    say "note: NVIDIA driver $driver; the pinned PyTorch uses CUDA 13, which wants driver 580 or newer."
  fi
}

pip_install() { # WHAT ARGUMENTS... ; to the log, with a sign of life every 15 seconds
  local what=$1 start=$SECONDS next=15 child
  shift
  say "$what ..."
  # DS_BUILD_OPS=0: DeepSpeed compiles nothing. --no-compile: byte code is made once at the end, on all cores. TMPDIR: what
  # an interrupted pip leaves lies on the disk that was checked, and goes with the next build.
  mkdir -p "$STATE/tmp"
  DS_BUILD_OPS=0 TMPDIR=$PWD/$STATE/tmp .venv/bin/python -m pip --disable-pip-version-check --no-input install --no-deps --no-compile \
    --no-build-isolation --progress-bar off "$@" >>"$LOG" 2>&1 &
  child=$!
  # shellcheck disable=SC2064 # the id of this child, now
  trap "kill $child 2>/dev/null; exit 130" INT TERM
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.3
    if ((SECONDS - start >= next)); then
      say "  $next s: $(grep -E '^ *(Collecting|Downloading|Building|Installing|Successfully)' "$LOG" | tail -n 1 | cut -c1-70)"
      next=$((next + 15))
    fi
  done
  trap - INT TERM
  if ! wait "$child"; then
    tail -n 15 "$LOG" >&2
    fail 1 "$what failed; the end of the log is above, all of it in $LOG. The next call starts this part again."
  fi
  rm -rf "$STATE/tmp"
}

torch_source() { # KIND ; prints the option that names PyTorch's own index when pip's sources lack the CPU build
  local pin
  [[ $1 == cpu ]] || return 0
  pin=$(grep '^torch==' launch/requirements-cpu.txt)
  if ! .venv/bin/python -m pip --disable-pip-version-check install --no-deps --dry-run -q "$pin" >>"$LOG" 2>&1; then
    printf -- '--extra-index-url=%s\n' "$TORCH_CPU_INDEX"
  fi
}

build() { # KIND DEV ; from nothing: a half-made environment is not worth mending
  local kind=$1 python list=launch/requirements-$1.txt start=$SECONDS sources=() tools=()
  python=$(find_python)
  check_machine "$kind" "$python"
  rm -rf .venv
  mkdir -p $STATE
  echo "$kind" >$STATE/kind
  say "making .venv for $kind with $("$python" --version) ($python)"
  "$python" -m venv .venv >>$LOG 2>&1 || fail 1 "making .venv failed: $(tail -n 3 $LOG)"
  # setuptools first: the one package without a wheel, DeepSpeed, is built by it, before torch is there, because its
  # build stops on a machine with a GPU build of torch and no CUDA toolkit.
  pip_install "installing setuptools" "$(grep '^setuptools==' "$list")"
  mapfile -t sources < <(torch_source "$kind")
  [[ $2 == no ]] || tools=(-r launch/requirements-dev.txt)
  pip_install "installing $(grep -c '==' "$list") pinned packages (a few minutes)" \
    "${sources[@]}" -r "$list" "${tools[@]}" -e .
  byte_compile
  stamp_of "$kind" "$list" >$STATE/base
  stamp_of project pyproject.toml >$STATE/project
  [[ $2 == no ]] || stamp_of dev launch/requirements-dev.txt >$STATE/dev
  say "installed in $((SECONDS - start)) s"
}

byte_compile() {
  say "byte-compiling (about half a minute) ..."
  # A few packages ship templates that are no valid Python; what cannot be compiled is compiled, or fails, at its import.
  # So are their tests, the hundreds of models of transformers and vLLM, of which a run imports one or two, and packages
  # that no run imports.
  local later='/(tests|testing|models|anthropic|numba|fontTools|peft|lexers)/|/ray/(data|llm|rllib|serve|train|tune)/'
  .venv/bin/python -m compileall -q -j 0 -x "$later" .venv/lib >>$LOG 2>&1 || true
}

main() {
  local kind='' dev=no argument
  for argument in "$@"; do
    case $argument in
      cpu | gpu) kind=$argument ;;
      --dev) dev=yes ;;
      -h | --help)
        sed -n '2,5s/^# //p' launch/setup.sh
        return
        ;;
      *) fail 2 "unknown argument '$argument'; usage: launch/setup.sh [cpu|gpu] [--dev]" ;;
    esac
  done
  [[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
    fail 2 "the pinned packages are for Linux on x86-64; this machine is $(uname -s) on $(uname -m). docker/ has images."
  exec 9<launch/setup.sh # one set-up at a time; the lock goes with the processes that hold it
  flock -n 9 || { say "another set-up is running here; waiting for it, 20 minutes at most" && flock -w 1200 9; } ||
    fail 1 "another set-up still runs after 20 minutes; see $LOG"
  [[ ! -e .venv || -d $STATE ]] ||
    fail 2 "$PWD/.venv exists and was not made by this script, so it is left alone. Move or remove it, then call again."
  if [[ -z $kind ]]; then
    if [[ -f $STATE/kind ]]; then kind=$(<$STATE/kind); elif nvidia-smi >/dev/null 2>&1; then kind=gpu; else kind=cpu; fi
  fi
  if ! is_done base "$(stamp_of "$kind" "launch/requirements-$kind.txt")" || ! .venv/bin/python -c '' 2>/dev/null; then
    [[ ! -d .venv ]] || say ".venv is incomplete, of another kind, or from another list: making it anew"
    build "$kind" "$dev"
  fi
  if ! is_done project "$(stamp_of project pyproject.toml)"; then
    pip_install "installing rlhf_dist" -e .
    stamp_of project pyproject.toml >$STATE/project
  fi
  if [[ $dev == yes ]] && ! is_done dev "$(stamp_of dev launch/requirements-dev.txt)"; then
    pip_install "installing the test tools" -r launch/requirements-dev.txt
    stamp_of dev launch/requirements-dev.txt >$STATE/dev
  fi
  say "ready: .venv ($kind)"
}

main "$@"
