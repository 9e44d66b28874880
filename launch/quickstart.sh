#!/usr/bin/env bash
# The main job in miniature, on a fresh machine with Python >= 3.11. Arguments go to
# `forgetscale quickstart` (--seeds, --methods, --output, --help).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_forgetscale report
exec "$PYTHON" -m forgetscale quickstart "$@"
