#!/usr/bin/env bash
# Submit ForgetScale jobs to SLURM: one job, or several that wait for each other.
#
#   bash launch/slurm.sh [OPTION...] JOB [ARGUMENT...] [then JOB [ARGUMENT...]]...
#
#   bash launch/slurm.sh --nodes=4 --gpus-per-node=8 --time=24:00:00 train --config run.yaml
#   bash launch/slurm.sh --nodes=2 --gpus-per-node=8 calibrate --config run.yaml \
#     then train --config run.yaml then report --runs runs/a --output runs/a
#   bash launch/slurm.sh --nodes=8 --processes-per-node=16 prepare --input 'data/*.jsonl.gz' \
#     --tokenizer models/olmo2 --block-size 512 --output data/ne-512
#   bash launch/slurm.sh --dry-run --nodes=2 train --config run.yaml      shows, submits nothing
#
# JOB: train, calibrate, evaluate, export, check   one run over all nodes, by the deepspeed launcher
#      generate                                    independent workers, one a GPU; with the engine
#                                                  zero3 one worker over all nodes
#      prepare                                     data_prep build, over all nodes by MPI
#      report, verify                              one process
#
# OPTION: of sbatch, written --name=value, or one of
#   --processes-per-node=N   default: the GPUs of a node; 1 where a job has none
#   --setup=FILE             sourced on every node first (module load, source .../activate)
#   --prefix='COMMAND'       put before python on every node, such as 'apptainer exec --nv fs.sif'
#   --python=PATH            interpreter on the nodes; default: the repository's .venv
#   --shared=DIR             folder that all nodes must see; default: where this was started
#   --no-preflight           start without looking at the nodes first
#   --dry-run                print what would be submitted
#
# A job gets USR1 120 s before its time ends or it is preempted: training writes a checkpoint, ends
# with 75 and is queued again by itself; so is a job that lost a node (ask for --nodes=3-4 to let it
# go on with fewer). Any other end is the job's exit code. No ssh is used, and MPI only by prepare.
# Preemption sends the signal only where slurm.conf asks for it (preempt_send_user_signal) and gives
# a GraceTime.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "launch/slurm.sh: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

sbatch_options=(--requeue --signal=USR1@120 --open-mode=append --kill-on-invalid-dep=yes)
settings=()
dry_run=""
shared="$PWD"
while [ "$#" -gt 0 ]; do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --no-preflight) settings+=("FORGETSCALE_PREFLIGHT=no") ;;
    --processes-per-node=*) settings+=("FORGETSCALE_PROCESSES=${1#*=}") ;;
    --setup=*)
      [ -f "${1#*=}" ] || fail "--setup: ${1#*=} is no file; name a script to source on every node."
      settings+=("FORGETSCALE_SETUP=$(realpath "${1#*=}")") ;;
    --prefix=*) settings+=("FORGETSCALE_PREFIX=${1#*=}") ;;
    --python=*) settings+=("FORGETSCALE_PYTHON=${1#*=}") ;;
    --shared=*) shared="$(realpath -m "${1#*=}")" ;;
    --*=* | --exclusive | --hold) sbatch_options+=("$1") ;;
    -*) fail "option $1 needs the form --name=value; see bash launch/slurm.sh --help." ;;
    *) break ;;
  esac
  shift
done
[ "$#" -gt 0 ] || fail "no job was named; see bash launch/slurm.sh --help."
for word in "${settings[@]}"; do
  case "$word" in
    FORGETSCALE_PROCESSES=*)
      [[ "${word#*=}" =~ ^[1-9][0-9]*$ ]] \
        || fail "--processes-per-node must be a number >= 1, got ${word#*=}." ;;
  esac
done
if [ -z "$dry_run" ] && ! command -v sbatch > /dev/null; then
  fail "sbatch was not found, so this is no SLURM machine; use the deepspeed launcher directly, or --dry-run to see the job."
fi

known=" train calibrate evaluate export check generate prepare report verify "
previous=""
submit() {
  [[ "$known" == *" $1 "* ]] || fail "'$1' is no job; known:$known(see --help)."
  local command=(sbatch --parsable --job-name="forgetscale-$1" --output=slurm-%j.out)
  command+=("${sbatch_options[@]}")
  [ -z "$previous" ] || command+=("--dependency=afterok:$previous")
  command+=("$repository/launch/slurm_job.sh" "FORGETSCALE_REPOSITORY=$repository")
  command+=("FORGETSCALE_SHARED=$shared" "${settings[@]}" "$@")
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    previous="JOB-$1"
    return
  fi
  previous="$("${command[@]}")"
  previous="${previous%%;*}"
  echo "$previous $1"
}

job=()
for word in "$@"; do
  if [ "$word" = then ]; then
    [ "${#job[@]}" -gt 0 ] || fail "'then' needs a job before and after it."
    submit "${job[@]}"
    job=()
  else
    job+=("$word")
  fi
done
[ "${#job[@]}" -gt 0 ] || fail "'then' needs a job before and after it."
submit "${job[@]}"
