#!/usr/bin/env bash
# Runs detection.train on every host of a Cloud TPU slice, by ssh from your own machine.
#
#   scripts/launch_pod.sh install --name=TPU --zone=ZONE --repo=GIT_URL [--ref=main]
#   scripts/launch_pod.sh train   --name=TPU --zone=ZONE --dataset=gs://BUCKET/dataset \
#       --workdir=gs://BUCKET/run -- --config=configs/detection/pod512.py
#   scripts/launch_pod.sh log     --name=TPU --zone=ZONE            the last lines of each host
#   scripts/launch_pod.sh stop    --name=TPU --zone=ZONE
#
# What follows -- goes to detection.train. --dataset is copied to each host (the index only: photos
# stay where the dataset's image_root says). The same `train` command goes on from the last
# checkpoint in --workdir. Further flags: --project=NAME, --folder=DIR on the hosts,
# --python=python3.11, --dry_run (prints the commands and runs nothing).
set -euo pipefail

usage() { sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { printf 'launch_pod: %s\n' "$*" >&2; exit 1; }

action=${1:-}
case $action in
  install | train | log | stop) shift ;;
  -h | --help | help) usage; exit 0 ;;
  *) usage >&2; fail "expected install, train, log or stop; found '${action}'" ;;
esac

name='' zone='' project='' repo='' ref=main folder=detection python=python3.11
dataset='' workdir='' dry_run=''
while (($#)); do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --repo=?*) repo=${1#*=} ;;
    --ref=?*) ref=${1#*=} ;;
    --folder=?*) folder=${1#*=} ;;
    --python=?*) python=${1#*=} ;;
    --dataset=?*) dataset=${1#*=} ;;
    --workdir=?*) workdir=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) fail "unknown or empty flag '$1'" ;;
  esac
  shift
done
train_flags=("$@")
[[ -n $name && -n $zone ]] || fail "--name and --zone are required"
[[ $action != train || ${#train_flags[@]} -gt 0 ]] || fail "train: give --config=... after --"
if [[ $action != train && ${#train_flags[@]} -gt 0 ]]; then fail "$action takes nothing after --"; fi

# quoted WORDS...: the words as one shell-safe string for the hosts' shell.
quoted() { local words; printf -v words '%q ' "$@"; printf '%s' "${words% }"; }

# on_all_hosts SCRIPT: runs a piece of bash on every host of the slice at once.
on_all_hosts() {
  local command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all)
  [[ -z $project ]] || command+=("--project=$project")
  local script="set -eu
$1"
  if [[ -n $dry_run ]]; then
    printf "%s --command='%s'\n" "$(quoted "${command[@]}")" "${script//\'/\'\\\'\'}"
  else
    "${command[@]}" "--command=$script"
  fi
}

at=$(quoted "$folder")
case $action in
  install)
    [[ -n $repo ]] || fail "install: --repo=GIT_URL is required"
    on_all_hosts "command -v $(quoted "$python") > /dev/null ||
  { sudo apt-get update -qq && sudo apt-get install -y -qq $(quoted "$python" "$python-venv"); }
[ -d $at/.git ] || git clone -q $(quoted "$repo") $at
cd $at && git fetch -q origin $(quoted "$ref") && git checkout -q --detach FETCH_HEAD
[ -x .venv/bin/python ] || $(quoted "$python") -m venv .venv
.venv/bin/pip install -q -e '.[tpu]'
git log -1 --format=%h"
    ;;
  train)
    [[ -n $workdir ]] || fail "train: --workdir=gs://BUCKET/DIR is required: all hosts write there"
    copy=:
    if [[ -n $dataset ]]; then
      copy="mkdir -p dataset && gcloud storage rsync -r $(quoted "$dataset") dataset"
      train_flags+=(--config.data.dir=dataset)
    fi
    # setsid: the run outlives the ssh connection. A host that already trains refuses a second run.
    on_all_hosts "cd $at
if [ -e train.pid ] && kill -0 \$(cat train.pid) 2> /dev/null; then
  echo \"already training: process \$(cat train.pid)\" >&2; exit 1
fi
$copy
setsid nohup .venv/bin/python -m detection.train $(quoted "--workdir=$workdir" "${train_flags[@]}") \
  > train.log 2>&1 < /dev/null &
echo \$! > train.pid"
    ;;
  log) on_all_hosts "tail -n 3 $at/train.log" ;;
  stop) on_all_hosts "cd $at; kill \$(cat train.pid); rm train.pid" ;;
esac
