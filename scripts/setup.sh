# Sourced by scripts/quickstart and scripts/test: `setup_venv [EXTRA]` makes .venv in the repository, installs kvq
# there with the given extra, and puts it first in PATH. Does nothing where that is already done.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${KVQ_VENV:-$root/.venv}

talk() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 1
}
[ -t 2 ] && [ -z "${NO_COLOR:-}" ] || talk() { printf '==> %s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer found" "install one, or name it: PYTHON=/path/to/python3 $0"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

setup_venv() {
  local extra=${1:-} what="$root" limits=() stamp
  [ -n "$extra" ] && what="$root[$extra]"
  if has_gpu; then
    talk "GPU found: torch and triton as pip resolves them"
  else
    limits=(-c "$root/constraints.txt")
  fi
  stamp=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)" ${limits[*]-} $root"

  if ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
    local python
    python=$(find_python) || exit 1
    talk "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
      die "could not make a virtual environment in $venv" "Debian and Ubuntu: apt-get install python3-venv"
  fi
  # One line per extra that is installed; written last, so that an interrupted installation is done again.
  if ! grep -qxF "${extra:-base} $stamp" "$venv/.kvq-installed" 2>/dev/null; then
    talk "installing kvq and what it needs (about a minute with a fast connection)"
    # pip's bars are for a person; a log gets its errors alone.
    "$venv/bin/python" -m pip install $([ -t 1 ] || echo --quiet) --disable-pip-version-check -e "$what" ${limits[@]+"${limits[@]}"} ||
      die "installation failed" "pip says why above; once mended, run $0 again"
    echo "${extra:-base} $stamp" >>"$venv/.kvq-installed"
    # An extra brings the base along.
    [ -z "$extra" ] || echo "base $stamp" >>"$venv/.kvq-installed"
  fi
  export PATH="$venv/bin:$PATH"
}
