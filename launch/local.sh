#!/usr/bin/env bash
# The whole loop on this machine: set-up, then a supervised start and GRPO on configs/local.yaml.
#   launch/local.sh [key=value ...]
# Overrides go to both stages. name=NAME names the runs NAME/sft and NAME/grpo; without it a name is made from the time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=local-$(date +%Y%m%d-%H%M%S)
output=runs
overrides=()
for argument in "$@"; do
  case $argument in
    -h | --help)
      sed -n '2,4s/^# //p' launch/local.sh
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
printf 'local: 1 of 2, supervised start: %s/%s/sft\n' "$output" "$name"
.venv/bin/rlhf-dist sft configs/local.yaml name="$name/sft" "${overrides[@]}"
printf 'local: 2 of 2, GRPO: %s/%s/grpo\n' "$output" "$name"
.venv/bin/rlhf-dist train configs/local.yaml name="$name/grpo" model.path="$output/$name/sft" "${overrides[@]}"
printf 'local: done in %s s\n' "$SECONDS"
printf 'local: %s\n' "run directory  $output/$name/grpo" "curves         $output/$name/grpo/curves.png" \
  "before/after   $output/$name/grpo/summary.json" "model          $output/$name/grpo/checkpoints"
