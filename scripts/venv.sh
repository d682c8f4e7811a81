# Sourced by scripts/quickstart, scripts/test and .ci/run: one way to make the virtual environment.
# shellcheck shell=bash

# make_venv DIRECTORY REQUIREMENTS: creates DIRECTORY if need be, installs REQUIREMENTS into it
# unless the same file was installed there before, and activates it.
make_venv() {
  local directory=$1 requirements=$2 python=${PYTHON:-python3} stamp
  if [[ ! -x $directory/bin/python ]]; then
    if ! command -v "$python" > /dev/null; then
      echo "error: $python not found; set PYTHON to a Python of version 3.11 or newer" >&2
      return 1
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: $("$python" --version) is too old; set PYTHON to 3.11 or newer" >&2
      return 1
    fi
    if ! "$python" -m venv "$directory"; then
      rm -f "$directory/bin/python"  # so that the next try starts over
      echo "error: $python cannot make a virtual environment (Debian: apt install python3-venv)" >&2
      return 1
    fi
  fi
  # shellcheck disable=SC1091
  source "$directory/bin/activate"
  stamp=$directory/.installed-$(basename "$requirements")
  if ! cat requirements*.txt | cmp -s - "$stamp"; then
    # Compiling 30,000 files that are never imported would cost a minute.
    python -m pip install --quiet --disable-pip-version-check --no-compile -r "$requirements"
    cat requirements*.txt > "$stamp"
  fi
}
