#!/usr/bin/env bash
# Runs any command of this project on one or several TPU slices of a GKE cluster, as a JobSet.
#
#   scripts/launch_gke.sh run detection.train --name=JOB --image=IMAGE --type=v5p --topology=4x4x8 \
#       [--num-slices=2] --workdir=gs://BUCKET/run [--restarts=N] [--env=K=V] [--dry_run] -- \
#       --config=configs/detection/pod512.py --config.data.dir=gs://BUCKET/dataset
#   scripts/launch_gke.sh status|logs|delete --name=JOB [--namespace=NAME]
#
# run sends the JobSet to the cluster of kubectl; --dry_run prints it. The cluster needs JobSet
# (https://jobset.sigs.k8s.io) and a node pool a slice. Slices talk over the data-centre network: the
# program is the same, its sums go through both. A pod that ends with 75 or is taken away ends all of
# them; they start again up to --restarts times (10), from the last checkpoint. Exit status 1, which
# is an error, fails the job. IMAGE is built from the Dockerfile here:
#
#   docker build -t REGION-docker.pkg.dev/PROJECT/REPOSITORY/detection . && docker push ...
#
# Further flags: --chips_per_host=4, --grace=180 (seconds for the last checkpoint), --spot.
set -euo pipefail

usage() { sed -n '2,/^set -/s/^#\( \|$\)//p' "${BASH_SOURCE[0]}"; }
fail() { printf 'launch_gke: %s\n' "$*" >&2; exit 1; }

action=${1:-} module=''
case $action in
  run | status | logs | delete) shift ;;
  -h | --help | help) usage; exit 0 ;;
  *) usage >&2; fail "expected run, status, logs or delete; found '$action'" ;;
esac
if [[ $action == run ]]; then
  module=${1:-}
  [[ $module =~ ^[a-z_]+(\.[a-z_]+)+$ ]] ||
    fail "run: expected a command such as detection.train, found '$module'"
  shift
fi

name='' image='' type='' topology='' workdir='' namespace=default spot='' dry_run=''
num_slices=1 restarts=10 grace=180 chips_per_host=4
variables=() module_flags=()
while (($#)); do
  case $1 in
    --name=?* | --image=?* | --type=?* | --topology=?* | --workdir=?* | --namespace=?*)
      key=${1%%=*}
      printf -v "${key#--}" '%s' "${1#*=}"
      ;;
    --num-slices=* | --restarts=* | --grace=* | --chips_per_host=*)
      [[ ${1#*=} =~ ^[0-9]+$ ]] || fail "${1%%=*}: found '${1#*=}', expected a whole number"
      key=${1%%=*} key=${key#--}
      printf -v "${key//-/_}" '%d' "$((10#${1#*=}))"
      ;;
    --env=[A-Za-z_]*=*) variables+=("${1#--env=}") ;;
    --spot | --dry_run) printf -v "${1#--}" yes ;;
    --) shift; module_flags=("$@"); break ;;
    *) fail "unknown or empty flag '$1'" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name: found '$name', expected a-z, 0-9 and -"

# The label of GKE's nodes.
accelerator() {
  case $type in
    v4) echo tpu-v4-podslice ;;
    v5e) echo tpu-v5-lite-podslice ;;
    v5p) echo tpu-v5p-slice ;;
    v6e) echo tpu-v6e-slice ;;
    *) fail "--type: found '$type', expected v4, v5e, v5p or v6e" ;;
  esac
}

# json TEXT: as a string of JSON, which YAML takes.
json() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

job_set() {
  local hosts word pair
  hosts=$((${topology//x/*} / chips_per_host))
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
  annotations:
    # One slice a node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      # Of the rule of podFailurePolicy below.
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $num_slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: main, operator: In, values: [1]}
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: $grace
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $kind
                cloud.google.com/gke-tpu-topology: $topology
YAML
  [[ -z $spot ]] || echo "                cloud.google.com/gke-spot: \"true\""
  cat << YAML
              containers:
                - name: main
                  image: $image
                  securityContext: {privileged: true}
                  ports: [{containerPort: 8471}, {containerPort: 8080}]
                  resources:
                    limits: {google.com/tpu: $chips_per_host}
                  env:
YAML
  for pair in "JAX_COMPILATION_CACHE_DIR=$workdir/programs" "${variables[@]}"; do
    printf '                    - {name: %s, value: %s}\n' "${pair%%=*}" "$(json "${pair#*=}")"
  done
  echo "                  args:"
  for word in "$module" "--workdir=$workdir" "${module_flags[@]}"; do
    printf '                    - %s\n' "$(json "$word")"
  done
}

case $action in
  run)
    for key in image type topology workdir; do
      [[ -n ${!key} ]] || fail "run: --$key is required"
    done
    [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "--topology: found '$topology', expected 4x4x8 or the like"
    ((${topology//x/*} % chips_per_host == 0)) ||
      fail "--topology: found $topology, expected a multiple of $chips_per_host chips (--chips_per_host)"
    ((num_slices > 0)) || fail "--num-slices: found 0, expected at least 1"
    kind=$(accelerator)
    yaml=$(job_set)
    if [[ -n $dry_run ]]; then
      printf '%s\n' "$yaml"
    elif ! said=$(kubectl create -f - <<< "$yaml" 2>&1); then
      [[ $said != *AlreadyExists* ]] ||
        fail "run: there is a job $name, perhaps an ended one: $0 delete --name=$name first"
      fail "run: $said"
    else
      printf '%s\n' "$said"
    fi
    ;;
  status) kubectl -n "$namespace" get pods -o wide -l "jobset.sigs.k8s.io/jobset-name=$name" ;;
  logs) kubectl -n "$namespace" logs --prefix --tail=5 --max-log-requests=512 -l "jobset.sigs.k8s.io/jobset-name=$name" ;;
  delete) kubectl -n "$namespace" delete jobset "$name" ;;
esac
