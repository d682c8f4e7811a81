#!/usr/bin/env bash
# One host's part of scripts/launch_pod.sh, which calls it by ssh in the folder of the clone.
#
#   scripts/pod/host.sh start WORKDIR COMMAND...   starts a command that outlives the connection;
#                                                  WORKDIR (- for none) gets copies of its log
#   scripts/pod/host.sh status                     one line
#   scripts/pod/host.sh logs LINES                 the last lines of the newest log
#   scripts/pod/host.sh stop SECONDS [again]       TERM, then KILL after so many seconds; again: it
#                                                  is to be started again, so its status says nothing of it
#
# .pod/ holds what the last command was, its process and its exit status; logs/ keeps every log.
set -euo pipefail

LOCK=${LIBTPU_LOCK:-/tmp/libtpu_lockfile}
BOOT=/proc/sys/kernel/random/boot_id
COPY_SECONDS=${POD_COPY_SECONDS:-300} # from one copy of the log to the next

fail() { printf 'host %s: %s\n' "$(number)" "$*" >&2; exit 1; }
say() { printf 'host %s: %s\n' "$(number)" "$*"; }

# The number of this host in its slice.
number() {
  local metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  if [[ -n ${TPU_WORKER_ID:-} ]]; then
    echo "$TPU_WORKER_ID"
  elif [[ -s .pod/number ]]; then
    cat .pod/number
  else
    curl -sf -m 5 -H 'Metadata-Flavor: Google' "$metadata/agent-worker-number" || hostname
  fi
}

# is_running FILE: whether the process whose id is in FILE lives; ids of before a boot mean others.
is_running() {
  [[ -s $1 && -s .pod/boot && $(< .pod/boot) == "$(< "$BOOT")" ]] && kill -0 "$(< "$1")" 2> /dev/null
}

# Whether the last command runs, or is about to.
is_busy() { [[ ! -s .pod/exit ]] && { is_running .pod/supervisor || is_running .pod/process; }; }

# What a killed run leaves behind: a lock that nobody holds.
free_tpu() {
  local users
  users=$(sudo -n fuser /dev/accel* /dev/vfio/[0-9]* 2> /dev/null || true)
  [[ -z ${users// /} ]] || fail "the TPU is in use by process ${users## }, which is not of this launcher"
  if [[ -e $LOCK ]]; then rm -f "$LOCK" 2> /dev/null || sudo -n rm -f "$LOCK"; fi
}

# TPU runtimes of v5e and later start and load faster with them.
use_huge_pages() {
  local file=/sys/kernel/mm/transparent_hugepage/enabled
  grep -qs '\[always\]' "$file" || echo always | sudo -n tee "$file" > /dev/null 2>&1 ||
    say "note: no transparent huge pages"
}

start() {
  local workdir=$1 log
  shift
  mkdir -p .pod logs
  if is_busy; then fail "already runs: $(< .pod/command)"; fi
  number > .pod/number.new
  mv .pod/number.new .pod/number
  free_tpu
  use_huge_pages
  rm -f .pod/exit .pod/stopped .pod/process
  echo "$*" > .pod/command
  cat "$BOOT" > .pod/boot
  log=logs/$(date -u +%Y%m%d-%H%M%S)-$$.log
  ln -sfn "$PWD/$log" .pod/log
  if [[ $workdir != - ]]; then export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/programs}; fi
  setsid nohup "$0" supervise "$workdir" "$log" "$@" > /dev/null 2>&1 < /dev/null &
  echo $! > .pod/supervisor
  say "started $*"
}

# copy_log WORKDIR LOG: to WORKDIR/logs/host-N, where that is wanted.
copy_log() {
  [[ $1 != - ]] || return 0
  local folder
  folder=$1/logs/host-$(number)
  if [[ $1 == *://* ]]; then
    gcloud storage cp -q "$2" "$folder/" || true
  else
    { mkdir -p "$folder" && cp "$2" "$folder/"; } || true
  fi
}

# Runs the command, keeps its exit status and copies its log now and then and at the end.
supervise() {
  local workdir=$1 log=$2 process copier status again
  shift 2
  printf '%s  %s\n' "$(date -u '+%F %T')" "$*" > "$log"
  "$@" >> "$log" 2>&1 < /dev/null &
  process=$!
  echo "$process" > .pod/process
  # The cloud's own TERM, before a spot machine goes, comes to this process as well.
  trap 'kill -TERM "$process" 2> /dev/null || true' TERM INT
  while sleep "$COPY_SECONDS"; do copy_log "$workdir" "$log"; done &
  copier=$!
  while :; do
    status=0
    wait "$process" || status=$?
    kill -0 "$process" 2> /dev/null || break # a signal ends a wait early
  done
  again=0
  wait "$process" 2> /dev/null || again=$?
  if ((status > 128 && again != 127)); then status=$again; fi
  printf '%s  ended with %d\n' "$(date -u '+%F %T')" "$status" >> "$log"
  echo "$status" > .pod/exit
  kill "$copier" 2> /dev/null || true
  copy_log "$workdir" "$log"
}

# started | running | ended STATUS | stopped STATUS | lost | idle, then the command.
status() {
  if [[ ! -s .pod/command ]]; then
    say idle
  elif is_busy; then
    say "running  $(< .pod/command)"
  elif [[ -e .pod/stopped ]]; then # also one that had ended or was lost before
    say "stopped $(cat .pod/exit 2> /dev/null || echo lost)  $(< .pod/command)"
  elif [[ -s .pod/exit ]]; then
    say "ended $(< .pod/exit)  $(< .pod/command)"
  else # the machine was started anew, or the supervisor was killed
    say "lost  $(< .pod/command)"
  fi
}

logs() {
  if [[ -e .pod/log ]]; then
    say "$(readlink .pod/log)"
    tail -n "$1" .pod/log
  else
    say "no log yet"
  fi
}

stop() {
  local seconds=$1 process tenths
  if [[ ${2:-} != again && -s .pod/command ]]; then touch .pod/stopped; fi
  if ! is_busy; then
    status
    return
  fi
  for ((tenths = 0; tenths < 50; tenths++)); do # one that was started just now
    if [[ -s .pod/process ]] || ! is_running .pod/supervisor; then break; fi
    sleep 0.1
  done
  if is_running .pod/process; then
    process=$(< .pod/process)
    kill -TERM "$process"
    for ((; seconds > 0; seconds--)); do
      kill -0 "$process" 2> /dev/null || break
      sleep 1
    done
    if kill -KILL "$process" 2> /dev/null; then say "killed after $1 s"; fi
    for ((tenths = 0; tenths < 50; tenths++)); do
      [[ ! -s .pod/exit ]] || break
      sleep 0.1
    done
  fi
  status
}

action=${1:?expected start, status, logs or stop}
shift
case $action in
  start | supervise | status | logs | stop) "$action" "$@" ;;
  *) fail "expected start, status, logs or stop; found '$action'" ;;
esac
