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
  # Two halves side by side: the unit tests keep one core busy, the others wait a lot.
  unit_log="$(mktemp)"
  status=0
  "$PYTHON" -m pytest "${selection[@]}" tests/unit > "$unit_log" 2>&1 &
  unit=$!
  trap 'kill "$unit" 2>/dev/null || true; rm -f "$unit_log"' EXIT
  echo "== tests on several processes and nodes, against references, of every method"
  "$PYTHON" -m pytest "${selection[@]}" --ignore tests/unit || status=$?
  echo "== unit tests"
  wait "$unit" || status=$?
  cat "$unit_log"
  exit "$status"
fi
exec "$PYTHON" -m pytest "${selection[@]}" "${arguments[@]}"
