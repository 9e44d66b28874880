#!/usr/bin/env bash
# The inside of a SLURM job, started by launch/slurm.sh (or by hand in an allocation of salloc):
#   bash launch/slurm_job.sh [NAME=VALUE...] JOB [ARGUMENT...]
# The first node looks for a free port, every node is looked at, then one deepspeed launcher a node
# starts the job. The exit code is the job's; 75 puts the job back into the queue.
set -uo pipefail

fail() {
  echo "launch/slurm_job.sh: $1" >&2
  exit 2
}

while [[ "${1:-}" =~ ^FORGETSCALE_[A-Z]+= ]]; do
  export "${1?}"
  shift
done
: "${FORGETSCALE_REPOSITORY:="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"}"
: "${FORGETSCALE_PYTHON:="$FORGETSCALE_REPOSITORY/.venv/bin/python"}"
: "${FORGETSCALE_SHARED:=$PWD}"
export FORGETSCALE_REPOSITORY FORGETSCALE_PYTHON FORGETSCALE_SHARED

# End a rank of this step that has lost its launcher; SLURM itself finds it by cgroups alone.
end_rank() {
  local process
  for process in /proc/[0-9]*; do
    if grep -szqx "RANK=$1" "$process/environ" \
      && grep -szqx "SLURM_JOB_ID=$SLURM_JOB_ID" "$process/environ" \
      && grep -szqx "SLURM_STEP_ID=$SLURM_STEP_ID" "$process/environ"; then
      kill -KILL "${process#/proc/}"
    fi
  done
}

# What one task of a step runs. USR1 goes to every process of a step: launchers must outlive it,
# training takes it as the request to stop. How the task ended is noted, also when it is told to by
# TERM: srun ends the others when one fails and then reports the largest of all exit codes.
on_node() {
  trap '' USR1
  local told=""
  trap 'told=yes' TERM
  if [ -n "${FORGETSCALE_SETUP:-}" ]; then
    # shellcheck disable=SC1090
    source "$FORGETSCALE_SETUP" || fail "--setup: $FORGETSCALE_SETUP failed on ${SLURMD_NODENAME:-this node}."
  fi
  export PYTHONPATH="$FORGETSCALE_REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
  : "${OMP_NUM_THREADS:=1}"
  export OMP_NUM_THREADS
  # A prefix is a command with its words, as written by the user.
  # shellcheck disable=SC2206
  local start=(${FORGETSCALE_PREFIX:-} "$FORGETSCALE_PYTHON") ranks=()
  if [ "$1" = launch ]; then
    shift
    local first=$((SLURM_NODEID * FORGETSCALE_PROCESSES))
    mapfile -t ranks < <(seq "$first" $((first + FORGETSCALE_PROCESSES - 1)))
    start+=("$(dirname "$FORGETSCALE_PYTHON")/deepspeed"
      --hostfile "$FORGETSCALE_SCRATCH/hostfile" --no_ssh --node_rank "$SLURM_NODEID"
      --master_addr "$FORGETSCALE_MASTER" --master_port "$FORGETSCALE_PORT" --module forgetscale)
  fi
  "${start[@]}" "$@"
  local status=$? rank left=()
  # The deepspeed command ends with 0 when its launcher is killed; only ranks know that they ended.
  for rank in "${ranks[@]}"; do
    [ "$status" -ne 0 ] || [ -e "$FORGETSCALE_SCRATCH/done-$rank" ] || left+=("$rank")
  done
  if [ "${#left[@]}" -gt 0 ]; then
    echo "launch/slurm_job.sh: the launcher on ${SLURMD_NODENAME:-this node} ended, but rank ${left[*]} did not come to its end; was the launcher killed? What it left is ended." >&2
    for rank in "${left[@]}"; do end_rank "$rank"; done
    status=1
  fi
  # Without the folder the job's script has ended already, and nobody reads it.
  [ ! -d "$FORGETSCALE_SCRATCH" ] || echo "$(date +%s.%N) $status ${SLURMD_NODENAME:-}" \
    > "$FORGETSCALE_SCRATCH/end-$SLURM_STEP_ID-$SLURM_PROCID"
  if [ "$status" -ne 0 ] && [ -z "$told" ]; then
    # srun ends the others as soon as one fails: they get some time to say how they ended. A task
    # that is told to end does so at once: SLURM repeats an order that takes long, and then it would
    # hit the job's next start.
    local ended
    for _ in {1..100}; do
      ended=("$FORGETSCALE_SCRATCH/end-$SLURM_STEP_ID"-*)
      [ "${#ended[@]}" -lt "${SLURM_STEP_NUM_TASKS:-1}" ] || break
      sleep 0.1
    done
  fi
  return "$status"
}
if [ "${1:-}" = on-node ]; then
  shift
  on_node "$@"
  exit
fi

[ "$#" -gt 0 ] || fail "no job was named; see bash launch/slurm.sh --help."
[ -n "${SLURM_JOB_ID:-}" ] || fail "no SLURM allocation (SLURM_JOB_ID is not set); submit with launch/slurm.sh or start it inside salloc."
trap '' USR1
self="$FORGETSCALE_REPOSITORY/launch/slurm_job.sh"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${#nodes[@]}" -eq "$SLURM_JOB_NUM_NODES" ] \
  || fail "scontrol names ${#nodes[@]} nodes, the allocation has $SLURM_JOB_NUM_NODES; look at SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST."
gpus="${SLURM_GPUS_ON_NODE:-0}"
: "${FORGETSCALE_PROCESSES:=$((gpus > 0 ? gpus : 1))}"
[ "$gpus" -eq 0 ] || [ "$FORGETSCALE_PROCESSES" -le "$gpus" ] \
  || fail "--processes-per-node=$FORGETSCALE_PROCESSES, but ${nodes[0]} has $gpus GPUs in this job; ask for more or start fewer."
address="$(scontrol show node "${nodes[0]}" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
FORGETSCALE_MASTER="${address:-${nodes[0]}}"
export FORGETSCALE_MASTER FORGETSCALE_PROCESSES

FORGETSCALE_SCRATCH="$(mktemp -d "$FORGETSCALE_SHARED/.forgetscale-job-$SLURM_JOB_ID-XXXXXX")" \
  || fail "no folder can be made in $FORGETSCALE_SHARED; name one that all nodes see with --shared=DIR."
export FORGETSCALE_SCRATCH
trap 'rm -rf "$FORGETSCALE_SCRATCH"' EXIT

# Run a step; its status is that of the task that failed first, or of one that a signal ended soon
# after: a rank that is killed takes the ranks of other nodes along, whose launchers may be quicker.
# Nodes of which there is no word are named, and asked whether they are there at all.
step() {
  srun --kill-on-bad-exit=1 --export=ALL "$@"
  local status=$? first node silent=()
  if [ "$status" -ne 0 ]; then
    first="$(cat "$FORGETSCALE_SCRATCH"/end-* 2>/dev/null | awk '$2 != 0' | sort -n | awk '
      NR == 1 { chosen = $0; begun = $1 }
      !killed && $1 < begun + 10 && $2 > 128 && $2 != 143 && $2 != 241 { chosen = $0; killed = 1 }
      END { print chosen }')"
    [ -z "$first" ] || status="$(echo "$first" | cut -d ' ' -f 2)"
    for node in "${expected[@]}"; do
      grep -qs " $node\$" "$FORGETSCALE_SCRATCH"/end-* || silent+=("$node")
    done
    first="${first##* }"
    echo "job $SLURM_JOB_ID: ended ${first:+first }with $status${first:+: $first}${silent[*]:+; no word from ${silent[*]}}" >&2
    for node in "${silent[@]}"; do
      timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" true > /dev/null 2>&1 \
        || lost+=("$node")
    done
  fi
  rm -f "$FORGETSCALE_SCRATCH"/end-* "$FORGETSCALE_SCRATCH"/done-*
  return "$status"
}
expected=()
lost=()
free_port() {
  local first=$((20000 + (SLURM_JOB_ID * 13 + ${SLURM_RESTART_COUNT:-0} * 101) % 20000))
  step --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" bash "$self" on-node \
    -m forgetscale.zero3.preflight "$first" | tail -n 1
}
on_all_nodes() {
  local expected=("${nodes[@]}")
  step --ntasks-per-node=1 --ntasks="${#nodes[@]}" bash "$self" on-node "$@"
}
collective() {
  FORGETSCALE_PORT="$(free_port)"
  [[ "$FORGETSCALE_PORT" =~ ^[0-9]+$ ]] \
    || fail "${nodes[0]} has no free port for the job; see the lines above."
  export FORGETSCALE_PORT
  if [ "${FORGETSCALE_PREFLIGHT:-yes}" = yes ]; then
    on_all_nodes -m forgetscale preflight --processes "$FORGETSCALE_PROCESSES" \
      --shared "$FORGETSCALE_SHARED" --master "$FORGETSCALE_MASTER:$FORGETSCALE_PORT" || return
  fi
  printf "%s slots=$FORGETSCALE_PROCESSES\n" "${nodes[@]}" > "$FORGETSCALE_SCRATCH/hostfile"
  on_all_nodes launch "$@"
}

case "$1" in
  train | calibrate | evaluate | export | check) collective "$@" ;;
  generate)
    engine=""
    if [[ " $* " == *" --config"* ]]; then
      engine="$(step --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" bash "$self" on-node -m forgetscale \
        "$@" --print-engine)" || exit
    fi
    if [ "${engine##*$'\n'}" = zero3 ]; then
      collective "$@"
    else
      step --ntasks-per-node="$FORGETSCALE_PROCESSES" bash "$self" on-node -m forgetscale "$@"
    fi ;;
  prepare)
    shift
    step --mpi=pmi2 --ntasks-per-node="$FORGETSCALE_PROCESSES" bash "$self" on-node -m data_prep build "$@" ;;
  verify)
    step --nodes=1 --ntasks=1 bash "$self" on-node -m data_prep "$@" ;;
  report)
    step --nodes=1 --ntasks=1 bash "$self" on-node -m forgetscale "$@" ;;
  *) fail "'$1' is no job; see bash launch/slurm.sh --help." ;;
esac
status=$?
again=""
[ "$status" -ne 75 ] || again="stopped early and safe"
[ "${#lost[@]}" -eq 0 ] || again="lost ${lost[*]}, which no longer answers"
if [ -n "$again" ]; then
  echo "job $SLURM_JOB_ID $again; it is queued again"
  scontrol requeue "$SLURM_JOB_ID" || echo "launch/slurm_job.sh: SLURM did not requeue job $SLURM_JOB_ID; submit it again, it goes on where it stopped." >&2
  # The requeue ends this script; until then it must not end the job.
  rm -rf "$FORGETSCALE_SCRATCH"
  sleep 60
fi
exit "$status"
