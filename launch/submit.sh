#!/usr/bin/env bash
# Runs a config as a job on a Ray cluster: rlhf-dist train CONFIG [key=value ...], with this working tree's code.
#   launch/submit.sh CONFIG [key=value ...]
# RAY_ADDRESS names the cluster's dashboard (default http://127.0.0.1:8265). The token comes from RAY_AUTH_TOKEN, from the
# file RAY_AUTH_TOKEN_PATH or from ~/.ray/auth_token; RAY_AUTH_MODE=disabled for a cluster without one.
# Secrets such as WANDB_API_KEY are never sent along: set them where the cluster's nodes start Ray, and the job has them.
# The nodes start Ray with rlhf-dist in PATH: in an activated .venv made by launch/setup.sh, or in an image from docker/.
# The log is followed to the end. Exit code 0 the job succeeded, 1 it failed, 2 bad input or no such cluster.
set -euo pipefail

fail() {
  printf 'submit: %s\n' "$@" >&2
  exit 2
}

check_config() { # prints the config's path inside the repository
  local path
  [[ -f $1 ]] || fail "config $1 does not exist."
  path=$(realpath "$1")
  [[ $path == "$PWD"/* ]] || fail "config $path lies outside $PWD; only this directory travels to the cluster. Copy it into configs/."
  printf '%s\n' "${path#"$PWD"/}"
}

check_token() {
  [[ ${RAY_AUTH_MODE:-token} == token ]] || return 0
  export RAY_AUTH_MODE=token
  [[ -z ${RAY_AUTH_TOKEN:-} ]] || return 0
  local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  [[ -s $file ]] ||
    fail "no token for the cluster: RAY_AUTH_TOKEN is not set and $file is missing or empty." \
      "Use the token that the cluster's head was started with; for a cluster without one: RAY_AUTH_MODE=disabled."
}

check_arguments() {
  local argument output=
  for argument in "$@"; do
    [[ $argument == *=* ]] || fail "'$argument' is not key=value; usage: launch/submit.sh CONFIG [key=value ...]"
    [[ $argument != output=* ]] || output=${argument#output=}
  done
  [[ $output == /* ]] || printf 'submit: note: %s\n' \
    "unless CONFIG sets an absolute output, the run directory lies in the job's own copy of this tree, which Ray removes later." \
    "Pass output=/a/path/that/the/nodes/share to keep it."
}

check_cluster() { # ADDRESS PYTHON ; one bounded request, because ray itself answers a wrong address with a traceback
  "$2" - "$1" <<'P' || exit 2
import os, pathlib, sys, urllib.error, urllib.request

address = sys.argv[1]
headers = {}
if os.environ["RAY_AUTH_MODE"] == "token":
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or pathlib.Path.home() / ".ray" / "auth_token"
    token = os.environ.get("RAY_AUTH_TOKEN") or pathlib.Path(file).read_text().strip()
    headers["Authorization"] = f"Bearer {token}"
try:
    urllib.request.urlopen(urllib.request.Request(f"{address}/api/version", headers=headers), timeout=10).close()
except urllib.error.HTTPError as error:
    if error.code in (401, 403):
        sys.exit(f"submit: the cluster at {address} refuses the token (HTTP {error.code}).")
    sys.exit(f"submit: {address} answers HTTP {error.code}; is it the dashboard of a Ray cluster?")
except (OSError, ValueError) as error:
    sys.exit(f"submit: no Ray dashboard answers at {address} ({error}). Start the cluster or set RAY_ADDRESS.")
P
}

main() {
  case ${1:-} in
    -h | --help)
      sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"
      return
      ;;
    '') fail "no config; usage: launch/submit.sh CONFIG [key=value ...]" ;;
  esac
  local given config address=${RAY_ADDRESS:-http://127.0.0.1:8265} bin
  given=$(realpath -m "$1")
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  config=$(check_config "$given")
  shift
  check_arguments "$@"
  [[ $address == http://* || $address == https://* ]] ||
    fail "RAY_ADDRESS=$address is not a dashboard's address; it looks like http://HOST:8265."
  bin=$PWD/.venv/bin
  [[ -x $bin/ray ]] || fail "$bin/ray is missing; make the environment first: launch/setup.sh"
  check_token
  check_cluster "${address%/}" "$bin/python"
  exec "$bin/ray" job submit --address "$address" --working-dir . \
    --runtime-env-json '{"excludes": [".git", ".venv", "runs", "wandb", ".cache", "benchmarks/results"]}' \
    -- rlhf-dist train "$config" "$@"
}

main "$@"
