# Sourced by scripts/launch_pod.sh: starts a command on all hosts, and again when a host was lost.
# shellcheck shell=bash disable=SC2154

# Of the hosts' lines (scripts/pod/host.sh status): how many say this.
hosts_that() { grep -cE "^host [^ ]+: ($1)( |\$)" <<< "$answers" || true; }

# Hosts whose command has ended, and not as all end together (0, 75).
ended_early='lost|idle|ended ([1-9]|[1-689][0-9]|7[0-46-9]|[1-9][0-9]{2})'

# One line of bash that starts the command on a host.
start_line() {
  local line=''
  if [[ -n $dataset ]]; then
    line="mkdir -p dataset && gcloud storage rsync -r $(quoted "$dataset") dataset && "
  fi
  local words=(.venv/bin/python -m "$module" "${module_flags[@]}")
  if ((${#variables[@]})); then words=(env "${variables[@]}" "${words[@]}"); fi
  printf '%s' "${line}scripts/pod/host.sh start $(quoted "${workdir:--}" "${words[@]}")"
}

run_with_restarts() {
  local answers='' hosts outcome
  if [[ -n $dry_run ]]; then
    print_run
    return
  fi
  answers=$(on_hosts "$(start_line)") ||
    { printf '%s\n' "$answers"; fail "$module did not start on all hosts"; }
  printf '%s\n' "$answers"
  hosts=$(hosts_that started)
  ((restarts)) || return 0
  while :; do
    wait_for_hosts
    printf '%s\n' "$answers"
    case $outcome in
      finished) return 0 ;;
      stopped) fail "$module was stopped" ;;
      failed) fail "$module failed; scripts/launch_pod.sh logs --lines=20 shows why" ;;
    esac
    start_again
  done
}

# Starts on all hosts of the last start, however many tries that takes.
start_again() {
  while :; do
    ((restarts-- > 0)) || fail "$module ended ($outcome), and all restarts are used up"
    printf '%s  %s: starts again, %d more times at most\n' "$(date +%T)" "$outcome" "$restarts"
    if [[ $outcome == gone ]] && ! create_again; then
      sleep "$poll"
      continue
    fi
    on_hosts "scripts/pod/host.sh stop $grace" > /dev/null 2>&1 || true
    answers=$(on_hosts "$(start_line)") || true
    printf '%s\n' "$answers"
    (($(hosts_that started) < hosts)) || return 0
    sleep "$poll"
    outcome=$(is_gone && echo gone || echo lost)
  done
}

# Whether the slice is no more, or is on its way.
is_gone() {
  local state
  state=$(slice_state 2> /dev/null) || return 1 # the network, perhaps
  [[ $state != READY && $state != ACTIVE ]]
}

# wait_for_hosts: waits until no host runs the command any more; sets answers and outcome: finished,
# stopped, failed, preempted (exit 75), lost (a host or its process), gone (the slice).
wait_for_hosts() {
  local silent=0 waited=0
  while :; do
    sleep "$poll"
    answers=$(on_hosts "scripts/pod/host.sh status" 2> /dev/null) || true
    if (($(hosts_that '[a-z]+') < hosts)); then
      if is_gone; then outcome=gone; return; fi
      ((++silent < 5)) || { outcome=lost; return; }
      continue
    fi
    silent=0
    if (($(hosts_that running))); then
      # A process that has joined the others ends them; for one that has not they wait for minutes.
      if (($(hosts_that "$ended_early") == 0)); then waited=0; fi
      (($(hosts_that "$ended_early") && (waited += poll) > patience)) || continue
      printf '%s  the others still run: they are stopped\n' "$(date +%T)"
      on_hosts "scripts/pod/host.sh stop $grace" > /dev/null 2>&1 || true
    fi
    # A host that was killed ends the others, which exit with 1: the cause is the signal.
    if (($(hosts_that stopped))); then
      outcome=stopped
    elif (($(hosts_that 'lost|idle|ended (129|1[3-9][0-9]|2[0-9][0-9])'))); then
      outcome=lost
    elif (($(hosts_that 'ended 75'))); then
      outcome=preempted
    elif (($(hosts_that 'ended 0') == hosts)); then
      outcome=finished
    else
      outcome=failed
    fi
    return
  done
}

create_again() {
  [[ -n $type && -n $repo ]] || fail "$name is gone: --type and --repo are needed to create it again"
  delete_slice || true
  create_slice && install_on_hosts
}

print_run() {
  on_hosts "$(start_line)"
  ((restarts)) || return 0
  echo "# every $poll s, until no host runs it any more:"
  on_hosts "scripts/pod/host.sh status"
  echo "# after exit 75, and when a host or its process was lost, at most $restarts times:"
  echo "# (hosts that still run it are stopped first)"
  on_hosts "scripts/pod/host.sh stop $grace"
  if [[ -n $type && -n $repo ]]; then
    echo "# (a slice that is gone is created and installed again)"
    delete_slice
    create_slice
    install_on_hosts
  fi
  on_hosts "$(start_line)"
}
