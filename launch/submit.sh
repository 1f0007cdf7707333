#!/usr/bin/env bash
# Runs a command as a job on a Ray cluster, from this checkout: rlhf-dist submit COMMAND CONFIG [key=value ...]
#   launch/submit.sh [--env NAME[=VALUE] ...] [COMMAND] CONFIG [key=value ...]
#   launch/submit.sh fetch JOB [DIRECTORY]
# COMMAND is train (also without one), sft, reward, pipeline or eval. launch/submit.sh --help says where the cluster and its token are named.
set -euo pipefail

command=train variables=()
while [[ ${1:-} == --env || ${1:-} == --env=* ]]; do
  [[ $1 == --env ]] && (($# > 1)) && variables+=("$1") && shift
  variables+=("$1") && shift
done
case ${1:-} in
  -h | --help) command=$1 && shift ;;
  fetch) exec "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/rlhf-dist" submit "$@" ;;
  train | sft | reward | pipeline | eval) command=$1 && shift ;;
esac
given=()
if (($#)); then
  given=("$(realpath -m -- "$1")")
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -x .venv/bin/rlhf-dist ]]; then
  echo "submit: .venv/bin/rlhf-dist is missing; make the environment first: launch/setup.sh" >&2
  exit 2
fi
exec .venv/bin/rlhf-dist submit "${variables[@]}" "$command" "${given[@]}" "$@"
