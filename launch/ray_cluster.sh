#!/usr/bin/env bash
# Makes this machine a node of a Ray cluster with a token: the head on one machine, then a worker on each of the others.
#   launch/ray_cluster.sh head [--address IP] [--port N] [--dashboard-port N] [--block] [-- OPTIONS of ray start]
#   launch/ray_cluster.sh worker HEAD[:PORT] [--address IP] [--block] [-- OPTIONS of ray start]
#   launch/ray_cluster.sh stop
# The token is RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; the head makes that file where there is none.
# --block stays in the foreground (containers, Slurm, systemd). RAY=/path/to/ray names another Ray than that of .venv.
# Exit code 0 ready, 1 Ray failed, 2 bad input or something missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LIMIT_S=120 # for a node to be ready
readonly END_LIMIT_S=5 # for its processes to end by themselves
HOST=$(uname -n)
STATE=${HOME:?}/.ray/node-$HOST

fail() { # CODE MESSAGE
  printf 'ray_cluster: %s\n' "$2" >&2
  exit "$1"
}

usage() { sed -n '2,8s/^# //p' launch/ray_cluster.sh; }

members() { # SESSION ; the processes of a node: Ray keeps them all in the session of its first one
  local stat line session state
  for stat in /proc/[0-9]*/stat; do
    { read -r line <"$stat"; } 2>/dev/null || continue
    read -r state _ _ session _ <<<"${line##*) }"
    stat=${stat#/proc/}
    [[ $session != "$1" || $state == Z ]] || echo "${stat%/stat}"
  done
}

running() { # prints the session of the node that this script started here
  local pid began
  [[ -f $STATE.pid ]] || return 1
  read -r pid began <"$STATE.pid"
  [[ $began == "$(began "$pid")" ]] && echo "$pid"
}

began() { # PID ; when it began, which tells it from a later process of the same number
  local line fields
  { read -r line <"/proc/$1/stat"; } 2>/dev/null || return 0
  read -ra fields <<<"${line##*) }"
  echo "${fields[19]}"
}

end_session() { # SESSION
  local i
  # All of them: told alone, the first one waits for actors that nobody ends.
  members "$1" | xargs -r kill 2>/dev/null || true
  have_ended "$1" && return
  members "$1" | xargs -r kill -9 2>/dev/null || true
  have_ended "$1" || fail 1 "processes of the node do not end: $(members "$1" | paste -sd ' ')"
}

have_ended() { # SESSION ; within END_LIMIT_S
  local i
  for ((i = 0; i < END_LIMIT_S * 5; i++)); do
    [[ -n $(members "$1") ]] || return 0
    sleep 0.2
  done
  return 1
}

stop() {
  local session
  session=$(running) || fail 2 "no node that this script started runs on $HOST"
  end_session "$session"
  rm -f "$STATE.pid"
  echo "ray_cluster: the node on $HOST has ended"
}

private() { # FILE ; whether others can read it
  local mode
  mode=$(stat -Lc %a "$1")
  ((8#$mode & 8#077)) || return 0
  fail 2 "others can read the token in $1, and so run code as you: chmod 600 $1"
}

find_token() { # head|worker ; sets TOKEN_FILE, empty where the environment has the token
  export RAY_AUTH_MODE=token
  TOKEN_FILE=
  [[ -z ${RAY_AUTH_TOKEN:-} ]] || return 0
  TOKEN_FILE=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  if [[ -s $TOKEN_FILE ]]; then
    private "$TOKEN_FILE"
    return
  fi
  [[ $1 == head ]] ||
    fail 2 "no token: RAY_AUTH_TOKEN is not set and $TOKEN_FILE is missing or empty. Copy that file from the head (scp -p), or set RAY_AUTH_TOKEN"
  (
    umask 077
    mkdir -p "$(dirname "$TOKEN_FILE")"
    "$PYTHON" -c 'import secrets; print(secrets.token_hex(32))' >"$TOKEN_FILE.$$"
    mv -n "$TOKEN_FILE.$$" "$TOKEN_FILE"
    rm -f "$TOKEN_FILE.$$"
  ) || fail 2 "the token cannot be written to $TOKEN_FILE"
  echo "ray_cluster: made a token, $TOKEN_FILE (keep it secret: who has it can run code here)"
}

say_ready() { # head|worker ADDRESS HEAD DASHBOARD_PORT
  [[ $1 == worker ]] && echo "ray_cluster: $2 is a node of the cluster at $3" && return
  local copy="with RAY_AUTH_TOKEN set as here"
  [[ -z $TOKEN_FILE ]] || copy="after copying $TOKEN_FILE there (scp -p)"
  printf 'ray_cluster: %s\n' "the head is at $3" "  another node   launch/ray_cluster.sh worker $3   $copy" \
    "  a job          RAY_ADDRESS=http://$2:$4 launch/submit.sh train configs/reverse.yaml output=/a/shared/folder"
}

start() { # head|worker WORDS...
  local kind=$1 block=no dashboard=8265 probe=() given=() head='' found address client pid
  shift
  if [[ $kind == worker ]]; then
    [[ -n ${1:-} && $1 != -* ]] || fail 2 "name the head, as in: launch/ray_cluster.sh worker 10.0.0.1"
    head=$1 probe+=(--head "$1") && shift
  fi
  while (($#)); do
    case $1 in
      --block) block=yes ;;
      --address | --port | --dashboard-port)
        [[ $kind == head || $1 == --address ]] || fail 2 "$1 is an option of head; a worker takes HEAD:PORT"
        (($# > 1)) || fail 2 "$1 needs a value"
        [[ $1 == --address ]] || [[ $2 =~ ^[0-9]{1,5}$ ]] || fail 2 "$1 is '$2'; give a number from 1 to 65535"
        [[ $1 != --dashboard-port ]] || dashboard=$2
        probe+=("$1" "$2") && shift
        ;;
      --) shift && given=("$@") && break ;;
      *) fail 2 "'$1' is no option of $kind; launch/ray_cluster.sh --help lists them. Options of ray start come after --" ;;
    esac
    shift
  done
  RAY=${RAY:-$PWD/.venv/bin/ray}
  [[ -x $RAY ]] || fail 2 "there is no $RAY; make the environment first: launch/setup.sh"
  PYTHON=$(dirname "$RAY")/python
  ! pid=$(running) || fail 2 "a node that this script started runs on $HOST (process $pid); launch/ray_cluster.sh stop ends it"
  find_token "$kind"
  # What another cluster's variables say must not reach Ray.
  unset RAY_ADDRESS
  found=$(PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -P -m rlhf_dist.cluster.node_probe "${probe[@]}") || exit $?
  read -r address client head <<<"$found"
  local words=(start --block --node-ip-address="$address" --dashboard-agent-listen-port=0 --disable-usage-stats)
  if [[ $kind == head ]]; then
    words+=(--head --port="${head##*:}" --dashboard-host="$address" --dashboard-port="$dashboard" --ray-client-server-port="$client")
  else
    words+=(--address="$head")
  fi
  # The jobs of the cluster find python and rlhf-dist here.
  export PATH=${RAY%/*}:$PATH
  if [[ $block == yes ]]; then
    say_ready "$kind" "$address" "$head" "$dashboard"
    exec "$RAY" "${words[@]}" "${given[@]}"
  fi
  mkdir -p "${STATE%/*}"
  : >"$STATE.log" # or the last start's words would be read
  setsid "$RAY" "${words[@]}" "${given[@]}" >"$STATE.log" 2>&1 </dev/null &
  pid=$!
  wait_for "$pid"
  echo "$pid $(began "$pid")" >"$STATE.pid"
  say_ready "$kind" "$address" "$head" "$dashboard"
}

wait_for() { # PID ; until Ray says that the node is up
  local i
  # shellcheck disable=SC2064 # the id of this process, now
  trap "end_session $1; exit 130" INT TERM
  for ((i = 0; i < LIMIT_S * 5; i++)); do
    if grep -q 'Ray runtime started' "$STATE.log"; then
      trap - INT TERM
      return
    fi
    kill -0 "$1" 2>/dev/null || break
    sleep 0.2
  done
  end_session "$1"
  tail -n 15 "$STATE.log" >&2
  fail 1 "Ray did not start within $LIMIT_S s; the end of its log is above, all of it in $STATE.log"
}

case ${1:-} in
  head | worker) start "$@" ;;
  stop) stop ;;
  -h | --help) usage ;;
  *) fail 2 "say head, worker or stop; launch/ray_cluster.sh --help explains" ;;
esac
