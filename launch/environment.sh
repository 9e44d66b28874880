# Make or reuse .venv in the repository root and install ForgetScale into it.
# Sourced by quickstart.sh and test.sh: `install_forgetscale EXTRAS`; sets $PYTHON.
# shellcheck shell=bash

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$repository/.venv/bin/python"

find_python() {
  local candidate
  for candidate in "${FORGETSCALE_PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python >= 3.11 found; install one or set FORGETSCALE_PYTHON to its path." >&2
  return 2
}

install_forgetscale() {
  local extras="$1" stamp wanted base
  stamp="$repository/.venv/.forgetscale-installed-$extras"
  wanted="$(cat "$repository/pyproject.toml" "$repository/launch/constraints.txt" | sha256sum)"
  if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if [ ! -x "$PYTHON" ]; then
    base="$(find_python)" || return 2
    echo "Making $repository/.venv with $("$base" --version) ..." >&2
    "$base" -m venv "$repository/.venv" || {
      echo "Python's venv module is missing; install it (Debian: apt-get install python3-venv)." >&2
      return 2
    }
  fi
  echo "Installing ForgetScale [$extras] with the tested versions (a few minutes the first time) ..." >&2
  "$PYTHON" -m pip install --quiet --disable-pip-version-check \
    --constraint "$repository/launch/constraints.txt" "torch==2.13.0" || return 1
  "$PYTHON" -m pip install --quiet --disable-pip-version-check \
    --constraint "$repository/launch/constraints.txt" --editable "$repository[$extras]" || return 1
  echo "$wanted" > "$stamp"
}
