# Sourced by scripts/launch_pod.sh: what it asks of gcloud. Reads that script's flags.
# shellcheck shell=bash disable=SC2154

# quoted WORDS...: the words as one shell-safe string.
quoted() {
  local word words=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    words+=" $word"
  done
  printf '%s' "${words# }"
}

# within SECONDS WORDS...: runs a command, which is ended after so long; '' is for ever.
within() {
  local running
  if [[ -z $1 ]]; then
    "${@:2}"
  else
    timeout -k 10 "$@" < /dev/null &
    running=$!
    # timeout has a process group of its own, which Ctrl-C does not reach.
    trap 'kill "$running" 2> /dev/null; trap - INT; kill -INT "$BASHPID"' INT
    wait "$running"
  fi
}

# perform WORDS...: runs a command for `limit` seconds at most, or prints it with --dry_run.
perform() {
  if [[ -n $dry_run ]]; then printf '%s\n' "$(quoted "$@")"; else within "$limit" "$@"; fi
}

# place: the flags that say where the slice is.
place() { printf -- '--zone=%s\n' "$zone"; [[ -z $project ]] || printf -- '--project=%s\n' "$project"; }

# on_hosts SCRIPT: runs a line of bash in the clone on all hosts at once.
on_hosts() { ssh_hosts "cd $(quoted "$folder") && $1"; }

# What each host does, in a line of its own (scripts/pod/host.sh status); those that answer in time.
hosts_status() {
  local limit=$answer_within
  ssh_hosts "if cd $(quoted "$folder") 2> /dev/null; then scripts/pod/host.sh status
else echo \"host \$(hostname): bare  no clone\"; fi"
}

# ssh_hosts SCRIPT: runs a piece of bash in the home folder of all hosts at once, for `limit` seconds
# at most. ssh gives up a host that is frozen after a minute.
ssh_hosts() {
  local command=(gcloud compute tpus tpu-vm ssh "$name" "--worker=$worker")
  mapfile -t -O "${#command[@]}" command < <(place)
  command+=("--ssh-flag=-o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4")
  if [[ -n $dry_run ]]; then
    printf "%s --command='%s'\n" "$(quoted "${command[@]}")" "${1//\'/\'\\\'\'}"
  else
    within "$limit" "${command[@]}" "--command=$1"
  fi
}

# The runtime that Cloud TPU's documentation names for a type.
runtime() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# Creates the slice, and waits for a queued one; fails where the cloud says no.
create_slice() {
  local flags=("--accelerator-type=$type") state
  mapfile -t -O 1 flags < <(place)
  [[ -z $spot ]] || flags+=(--spot)
  [[ -z $reserved ]] || flags+=(--reserved)
  if [[ -z $queued ]]; then
    perform gcloud compute tpus tpu-vm create "$name" "${flags[@]}" "--version=${version:-$(runtime)}"
    return
  fi
  [[ -z $valid_for ]] || flags+=("--valid-until-duration=$valid_for")
  perform gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${flags[@]}" \
    "--runtime-version=${version:-$(runtime)}" || return 1
  if [[ -n $dry_run ]]; then
    echo "# every $poll s, until it is ACTIVE:"
    slice_state
    return
  fi
  until state=$(slice_state); [[ $state == ACTIVE ]]; do
    case $state in
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        printf 'launch_pod: the queued request of %s is %s\n' "$name" "$state" >&2
        return 1
        ;;
    esac
    printf '%s  %s is %s\n' "$(date +%T)" "$name" "${state:-unknown}"
    sleep "$poll"
  done
}

# slice_state: READY (ACTIVE of a queued one), PREEMPTED, ...
slice_state() {
  local flags limit=$answer_within
  mapfile -t flags < <(place)
  if [[ -n $queued ]]; then
    perform gcloud compute tpus queued-resources describe "$name" "${flags[@]}" "--format=value(state.state)"
  else
    perform gcloud compute tpus tpu-vm describe "$name" "${flags[@]}" "--format=value(state)"
  fi
}

delete_slice() {
  local flags
  mapfile -t flags < <(place)
  if [[ -n $queued ]]; then
    perform gcloud compute tpus queued-resources delete "$name" "${flags[@]}" --force --quiet
  else
    perform gcloud compute tpus tpu-vm delete "$name" "${flags[@]}" --quiet
  fi
}

# The hosts' images bring no Python that this project takes: uv fetches one. Right after the first
# start the system's own upgrades hold apt's lock.
install_on_hosts() {
  ssh_hosts "set -eu
command -v git > /dev/null || {
  sudo apt-get -o DPkg::Lock::Timeout=900 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=900 install -y -qq git; }
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d $(quoted "$folder")/.git ] || git clone -q $(quoted "$repo") $(quoted "$folder")
cd $(quoted "$folder")
git fetch -q origin $(quoted "$ref")
git checkout -q --detach FETCH_HEAD
[ -x .venv/bin/python ] || ~/.local/bin/uv venv -q --python $(quoted "$python") .venv
~/.local/bin/uv pip install -q --python .venv/bin/python -e '.[tpu]'
git log -1 --format=%h"
}
