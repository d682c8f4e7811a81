#!/usr/bin/env bash
# Runs any command of this project on every host of a Cloud TPU slice, by ssh from your own machine.
#
#   scripts/launch_pod.sh create  --name=TPU --zone=ZONE --type=v4-512 [--spot] [--queued]
#   scripts/launch_pod.sh install --name=TPU --zone=ZONE --repo=GIT_URL [--ref=main]
#   scripts/launch_pod.sh run detection.train --name=TPU --zone=ZONE --dataset=gs://BUCKET/dataset \
#       --workdir=gs://BUCKET/run [--restarts=N] -- --config=configs/detection/pod512.py
#   scripts/launch_pod.sh status|logs|stop|delete --name=TPU --zone=ZONE
#
# What follows -- goes to the command, detection.train or another: detection.evaluate, detection.export,
# detection.pretrain, segmentation.train, ensemble.merge... The same run goes on from where it stopped.
#
#   --flags=FILE      more flags, one a line: what all actions of a slice share
#   --project=NAME    of the cloud
#   --dry_run         prints the commands and runs nothing
# create:
#   --spot            cheaper, may be taken away; --reserved: of a reservation
#   --queued          waits until the slice is free (queued resources); delete needs the flag, too
#   --valid_for=6h    of --queued: gives up after
#   --version=NAME    runtime; default: the one of the type
# install and run:
#   --folder=DIR      of the clone on the hosts (openimages-detection), --python=3.11
# run:
#   --workdir=DIR     goes to the command; gets logs/host-N and the compiled programs
#   --dataset=DIR     is copied to each host (the index only: photos stay where its image_root says)
#   --env=K=V         environment variable of the command; may be given several times
#   --worker=0        on these hosts only, such as ensemble.merge, which needs one
#   --restarts=N      stays, or takes up what runs already, and starts again up to N times when a
#                     command ended with 75 (preempted, or another host was missed) or a host was lost;
#                     with --type and --repo a slice that is gone is created again. A restart is spent
#                     when all hosts have started: not while the cloud has none, is repairing, or does
#                     not answer. It needs valid credentials all the time; it ends when the slice is
#                     deleted or the run stopped by another launch_pod.sh
#   --poll=30         seconds between two looks
#   --answer_within=120  seconds that hosts have for an answer; what others say then counts
#   --patience=60     seconds that hosts may run on when one has failed, before they are stopped
# logs: --lines=5;  stop: --grace=180 seconds from TERM to KILL
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,/^set -/s/^#\( \|$\)//p' "${BASH_SOURCE[0]}"; }
fail() { printf 'launch_pod: %s\n' "$*" >&2; exit 1; }

action=${1:-} module=''
case $action in
  create | install | run | status | logs | stop | delete) shift ;;
  -h | --help | help) usage; exit 0 ;;
  *) usage >&2; fail "expected create, install, run, status, logs, stop or delete; found '$action'" ;;
esac
if [[ $action == run ]]; then
  module=${1:-}
  [[ $module =~ ^[a-z_]+(\.[a-z_]+)+$ ]] ||
    fail "run: expected a command such as detection.train, found '$module'"
  shift
fi

name='' zone='' project='' type='' version='' repo='' ref=main folder=openimages-detection python=3.11
spot='' reserved='' queued='' valid_for='' dataset='' workdir='' worker=all dry_run=''
restarts=0 poll=30 patience=60 answer_within=120 lines=5 grace=180 limit=''
variables=() module_flags=()

# read_flag FLAG: sets a variable above.
read_flag() {
  case $1 in
    --name=?* | --zone=?* | --project=?* | --type=?* | --version=?* | --repo=?* | --ref=?* | --folder=?* | \
      --python=?* | --valid_for=?* | --dataset=?* | --workdir=?* | --worker=?*)
      local key=${1%%=*}
      printf -v "${key#--}" '%s' "${1#*=}"
      ;;
    --restarts=* | --poll=* | --patience=* | --answer_within=* | --lines=* | --grace=*)
      [[ ${1#*=} =~ ^[0-9]+$ ]] || fail "${1%%=*}: found '${1#*=}', expected a whole number"
      local key=${1%%=*}
      printf -v "${key#--}" '%d' "$((10#${1#*=}))"
      ;;
    --env=[A-Za-z_]*=*) variables+=("${1#--env=}") ;;
    --flags=?*)
      local line
      [[ -r ${1#*=} ]] || fail "--flags: no such file: ${1#*=}"
      while IFS= read -r line || [[ -n $line ]]; do
        case $line in '' | '#'*) ;; *) read_flag "$line" ;; esac
      done < "${1#*=}"
      ;;
    --spot | --reserved | --queued | --dry_run) printf -v "${1#--}" yes ;;
    *) fail "unknown or empty flag '$1'" ;;
  esac
}

while (($#)); do
  if [[ $1 == -- ]]; then
    shift
    module_flags=("$@")
    break
  elif [[ $1 == --env && $# -gt 1 ]]; then
    shift
    read_flag "--env=$1"
  else
    read_flag "$1"
  fi
  shift
done
[[ -n $name && -n $zone ]] || fail "--name and --zone are required"
[[ $action == run || ${#module_flags[@]} -eq 0 ]] || fail "$action takes nothing after --"
[[ -z $spot || -z $reserved ]] || fail "--spot and --reserved: expected one of them"

# shellcheck source=scripts/pod/cloud.sh
source "$here/pod/cloud.sh"
# shellcheck source=scripts/pod/restarts.sh
source "$here/pod/restarts.sh"

case $action in
  create)
    [[ -n $type ]] || fail "create: --type is required, such as v4-512 or v5litepod-256"
    create_slice || fail "$name was not created"
    ;;
  install)
    [[ -n $repo ]] || fail "install: --repo=GIT_URL is required"
    install_on_hosts
    ;;
  run)
    [[ ${#module_flags[@]} -gt 0 ]] || fail "run: give the flags of $module after --"
    if [[ -n $dataset ]]; then
      case $module in
        detection.* | segmentation.*) module_flags+=(--config.data.dir=dataset) ;;
      esac
    fi
    if [[ -n $workdir ]]; then module_flags=("--workdir=$workdir" "${module_flags[@]}"); fi
    run_with_restarts
    ;;
  status)
    slice_state
    hosts_status
    ;;
  logs) limit=$answer_within on_hosts "scripts/pod/host.sh logs $lines" ;;
  stop) limit=$((grace + answer_within)) on_hosts "scripts/pod/host.sh stop $grace" ;;
  delete) delete_slice ;;
esac
