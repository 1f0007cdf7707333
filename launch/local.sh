#!/usr/bin/env bash
# The whole of RLHF on this machine: set-up, then the pipeline of configs/local.yaml: a supervised start, a reward model,
# PPO against it, and GRPO from the same start; at the end one table of all models, and a report that a browser shows.
#   launch/local.sh [key=value ...]
# Overrides go to all stages, STAGE:key=value to one. name=NAME names the runs NAME/sft, NAME/reward, NAME/ppo and
# NAME/grpo (local without it).
# The same name again skips what is complete, goes on where it was cut, and runs anew what changed; the old run is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=local
output=runs
overrides=()
for argument in "$@"; do
  case $argument in
    -h | --help)
      sed -n '2,7s/^# //p' launch/local.sh
      exit 0
      ;;
    name=*) name=${argument#name=} ;;
    output=*)
      output=${argument#output=}
      overrides+=("$argument")
      ;;
    *=*) overrides+=("$argument") ;;
    *)
      printf "local: '%s' is not key=value; usage: launch/local.sh [key=value ...]\n" "$argument" >&2
      exit 2
      ;;
  esac
done

launch/setup.sh
printf 'local: %s/%s\n' "$output" "$name"
code=0
(
  trap - INT # without job control, what runs beside the script would ignore it
  exec .venv/bin/rlhf-dist pipeline configs/local.yaml name="$name" "${overrides[@]}"
) &
run=$!
for signal in INT TERM HUP; do
  # shellcheck disable=SC2064 # the id of this run, now
  trap "kill -$signal $run 2>/dev/null || true" "$signal"
done
while :; do # a signal that is passed on interrupts the wait
  code=0
  wait "$run" || code=$?
  kill -0 "$run" 2>/dev/null || break
done
code=0
wait "$run" || code=$?
trap - INT TERM HUP
if ((code != 0)); then
  # After bad input (2) the same words would fail again.
  if ((code != 2)) && [[ -d $output/$name ]]; then
    printf 'local: to go on from here: %s\n' "$(printf '%q ' launch/local.sh "name=$name" "${overrides[@]}")" >&2
  fi
  exit "$code"
fi
printf 'local: done in %s s\n' "$SECONDS"
printf 'local: %s\n' "report  $output/$name/report.html" "table   $output/$name/pipeline.txt" \
  "models  $output/$name/STAGE/checkpoints" "curves  $output/$name/STAGE/curves.png" \
  "the same command again skips all that is complete; name=ANOTHER begins a new run"
