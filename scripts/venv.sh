# Sourced by scripts/quickstart, scripts/mask_demo, scripts/test and .ci/run: one way to make the
# virtual environment.
# shellcheck shell=bash

# make_venv DIRECTORY EXTRAS: creates DIRECTORY if need be, installs the project into it with these
# extras of pyproject.toml ("cpu,test") unless that was done before, and activates it.
make_venv() {
  local directory=$1 extras=$2 python=${PYTHON:-python3} stamp
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
  stamp=$directory/.installed-$extras
  if ! cmp -s pyproject.toml "$stamp"; then
    # Compiling 30,000 files that are never imported would cost a minute.
    local install=(python -m pip install --quiet --disable-pip-version-check --no-compile)
    "${install[@]}" -e ".[$extras]"
    # The package index has no lvis that is content with opencv-python-headless.
    if [[ ,$extras, == *,peers,* ]]; then "${install[@]}" --no-deps "lvis>=0.5.3,<1"; fi
    cp pyproject.toml "$stamp"
  fi
}
