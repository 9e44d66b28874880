#!/usr/bin/env bash
# Style, types, layers and all tests, on a fresh machine with Python >= 3.11.
#   bash launch/test.sh             everything that CI runs, under 20 minutes on 2 cores
#   bash launch/test.sh --long      more seeds, fault matrix, large property runs
#   bash launch/test.sh -k stream   arguments go on to pytest (then only pytest runs)
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_forgetscale test
cd "$repository"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
bin="$repository/.venv/bin"
export PATH="$bin:$PATH"

selection=(-m "not long")
arguments=()
for argument in "$@"; do
  if [ "$argument" = "--long" ]; then selection=(); else arguments+=("$argument"); fi
done

if [ "${#arguments[@]}" -eq 0 ]; then
  echo "== format and lint"
  ruff format --check forgetscale data_prep tests launch
  ruff check forgetscale data_prep tests launch
  echo "== types"
  mypy forgetscale data_prep
  echo "== layers"
  lint-imports
  # Three parts side by side: starting ranks and jobs waits a lot.
  logs="$(mktemp -d)"
  pids=()
  trap 'kill "${pids[@]}" 2>/dev/null || true; rm -rf "$logs"' EXIT
  "$PYTHON" -m pytest "${selection[@]}" tests/unit tests/contract tests/distributed/test_[s-z]*.py \
    > "$logs/first" 2>&1 &
  pids+=($!)
  "$PYTHON" -m pytest "${selection[@]}" tests/cluster tests/parity tests/distributed/test_[a-e]*.py \
    > "$logs/second" 2>&1 &
  pids+=($!)
  status=0
  echo "== tests on several processes"
  "$PYTHON" -m pytest "${selection[@]}" tests/golden tests/distributed/test_[f-r]*.py || status=$?
  echo "== unit tests, what every method must keep, more on several processes"
  wait "${pids[0]}" || status=$?
  cat "$logs/first"
  echo "== jobs on SLURM, runs against dense references, more on several processes"
  wait "${pids[1]}" || status=$?
  cat "$logs/second"
  exit "$status"
fi
exec "$PYTHON" -m pytest "${selection[@]}" "${arguments[@]}"
