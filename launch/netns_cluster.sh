#!/usr/bin/env bash
# A Ray cluster of several nodes on one Linux machine, and one command on its first node: launch/netns_cluster.sh --help
#
# Each node has its own network namespace (an address, a bridge between them) and its own mount namespace, with its own
# /dev/shm. So whatever gets from one node to another has crossed a network.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."

USAGE="usage: launch/netns_cluster.sh [--nodes N] [--cpus N] [--own DIR] COMMAND ...

Starts N Ray nodes (3) of N CPUs each (1) in network namespaces of this machine, runs COMMAND on the first one with RAY_ADDRESS and a
token set, and removes everything again. The exit code is the command's.

--own DIR: a folder that each node sees empty and as its own, as without a shared disk

Requires root and iproute2 (ip, with network namespaces) and util-linux (unshare, nsenter)."
LIMIT_S=90 # for the nodes to find each other
NET=10.77.$(($$ % 250))

fail() { # CODE MESSAGE
  echo "netns_cluster: $2" >&2
  exit "$1"
}

nodes=3 cpus=1 own=
while (($#)); do
  case $1 in
  -h | --help) echo "$USAGE" && exit 0 ;;
  --nodes | --cpus | --own)
    (($# > 1)) || fail 2 "$1 needs a value; $USAGE"
    printf -v "${1#--}" %s "$2"
    shift 2
    ;;
  --) shift && break ;;
  -*) fail 2 "'$1' is no option; $USAGE" ;;
  *) break ;;
  esac
done
[[ $nodes =~ ^[1-9][0-9]?$ ]] || fail 2 "--nodes is '$nodes'; give a number from 1 to 99"
[[ $cpus =~ ^[1-9][0-9]*$ ]] || fail 2 "--cpus is '$cpus'; give a number of 1 or more"
(($#)) || fail 2 "name a command to run; $USAGE"
((EUID == 0)) || fail 2 "root is required, to make network namespaces"
for tool in ip unshare nsenter; do
  command -v "$tool" >/dev/null || fail 2 "the command $tool is missing (Debian, Ubuntu: apt install iproute2 util-linux)"
done
RAY=${RAY:-$PWD/.venv/bin/ray}
[[ -z $own || $own == /* ]] || own=$caller/$own
[[ -z $own || -d $own ]] || fail 2 "--own is '$own', which is not a directory"
[[ -x $RAY ]] || fail 2 "there is no $RAY: run launch/setup.sh first"
PYTHON=$(dirname "$RAY")/python

temp=$(mktemp -d /tmp/rlhf-netns-XXXXXX)
logs=$(mktemp -d /tmp/rlhf-netns-logs-XXXXXX)
bridge=rb$$
pids=()

space() { # NODE
  echo "rlhf-$$-$1"
}

# shellcheck disable=SC2329 # by the trap
end() {
  local i
  set +e
  for ((i = 1; i <= nodes; i++)); do
    ip netns pids "$(space "$i")" 2>/dev/null | xargs -r kill 2>/dev/null
  done
  for ((i = 0; i < 15; i++)); do # some of Ray's processes stay for longer, and there is nothing for them to save
    [[ -n $(for ((j = 1; j <= nodes; j++)); do ip netns pids "$(space "$j")" 2>/dev/null; done) ]] || break
    sleep 0.2
  done
  for ((i = 1; i <= nodes; i++)); do
    ip netns pids "$(space "$i")" 2>/dev/null | xargs -r kill -9 2>/dev/null
    ip netns del "$(space "$i")" 2>/dev/null
  done
  ip link del "$bridge" 2>/dev/null
  rm -rf "$temp" "$logs"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')}
export RAY_AUTH_TOKEN

ip link add "$bridge" type bridge
ip link set "$bridge" up
for ((i = 1; i <= nodes; i++)); do
  name=$(space "$i")
  ip netns add "$name"
  ip link add "rv$$-$i" type veth peer name eth0 netns "$name"
  ip link set "rv$$-$i" master "$bridge" up
  ip -n "$name" addr add "$NET.$i/24" dev eth0
  ip -n "$name" link set lo up
  ip -n "$name" link set eth0 up
done

start_node() { # NODE WORDS...
  local node=$1 mounts="mount -t tmpfs -o size=2g tmpfs /dev/shm && mount -t tmpfs tmpfs $temp"
  shift
  [[ -z $own ]] || mounts+=" && mount -t tmpfs tmpfs $(printf %q "$own")"
  ip netns exec "$(space "$node")" unshare --mount --propagation private \
    bash -c "$mounts && exec \"\$@\"" node \
    "$RAY" start --block --node-ip-address="$NET.$node" --num-cpus="$cpus" --num-gpus=0 --disable-usage-stats \
    --object-store-memory=200000000 "$@" >"$logs/node-$node.log" 2>&1 &
  pids+=($!)
  disown # else bash reports its end
}

on_head() { # COMMAND... ; in the folder of the caller, as the first node sees it
  # shellcheck disable=SC2016 # for the inner shell
  nsenter --target "${pids[0]}" --net --mount bash -c 'cd "$1" && shift && exec "$@"' on_head "$caller" "$@"
}

start_node 1 --head --port=6379 --include-dashboard=false --temp-dir="$temp"
export RAY_ADDRESS=$NET.1:6379
for ((i = 2; i <= nodes; i++)); do
  start_node "$i" --address="$RAY_ADDRESS"
done
for ((i = 0; i < LIMIT_S * 5; i++)); do
  on_head test -e "$temp/session_latest" 2>/dev/null && break
  sleep 0.2
done
if ! on_head env PYTHONPATH="$PWD" "$PYTHON" -P -m rlhf_dist.cluster.node_wait "$RAY_ADDRESS" "$nodes" "$LIMIT_S" >"$logs/start.log" 2>&1; then
  tail -n 5 "$logs"/*.log >&2
  fail 1 "the $nodes nodes did not find each other in $LIMIT_S s; the ends of their logs are above"
fi
# In the background, so that a signal is handled at once; the command is in the namespace, and ends with it.
on_head "$@" <&0 &
code=0
wait $! || code=$?
exit "$code"
