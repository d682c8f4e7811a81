# Sourced by scripts/launch_pod.sh: starts a command on all hosts, and again when a host was lost.
# shellcheck shell=bash disable=SC2154

most_tries=50 # in a row, of an installation or a start that not all hosts do: some eight hours
longest_pause=600 # seconds between two tries
ended='ended|stopped|lost|idle'
# Hosts whose command has ended, and not as all end together (0, 75).
ended_early='lost|idle|ended ([1-9]|[1-689][0-9]|7[0-46-9]|[1-9][0-9]{2})'

# Of the hosts' lines (scripts/pod/host.sh status): how many say this.
hosts_that() { grep -cE "^host [^ ]+: ($1)( |\$)" <<< "$answers" || true; }

# How many of them run this very command.
hosts_that_run_it() {
  local line count=0
  while IFS= read -r line; do
    if [[ $line == "host "*": running  ${words[*]}" ]]; then count=$((count + 1)); fi
  done <<< "$answers"
  echo "$count"
}

# note TEXT: says what keeps the launcher waiting, once until that changes.
note() {
  if [[ $1 != "$noted" ]]; then printf '%s  %s\n' "$(date +%T)" "$1"; fi
  noted=$1
}

# What gcloud said last, in one line: its error, if there is one.
gcloud_said() {
  grep -m 1 '^ERROR' "$said" || grep -vE '^ *$|Attempting' "$said" | tail -n 1 ||
    echo "nothing more within $answer_within s"
}

# What the hosts said last, if any said something.
show_answers() { [[ -z $answers ]] || printf '%s\n' "$answers"; }

# look: asks all hosts; sets answers to what they say, and complete where all could be asked.
look() {
  complete=yes
  answers=$(hosts_status 2> "$said") || complete=''
}

# slice_is: ready, gone, deleting, absent, unknown (to gcloud, now), or a state that will pass.
slice_is() {
  local state
  if ! state=$(slice_state 2> "$said"); then
    if grep -q NOT_FOUND "$said"; then echo absent; else echo unknown; fi
    return
  fi
  case $state in
    READY | ACTIVE) echo ready ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED) echo gone ;;
    DELETING) echo deleting ;;
    *) echo "${state:-unknown}" ;; # CREATING, REPAIRING, SUSPENDING, ...
  esac
}

# The command as a host runs it.
command_words() {
  words=(.venv/bin/python -m "$module" "${module_flags[@]}")
  if ((${#variables[@]})); then words=(env "${variables[@]}" "${words[@]}"); fi
}

# One line of bash that starts the command on a host.
start_line() {
  local line=''
  if [[ -n $dataset ]]; then
    line="mkdir -p dataset && gcloud storage rsync -r $(quoted "$dataset") dataset && "
  fi
  printf '%s' "${line}scripts/pod/host.sh start $(quoted "${workdir:--}" "${words[@]}")"
}

# Starts the command; fails unless all hosts say so: as many as the last time.
start_on_hosts() {
  local complete=yes started
  answers=$(on_hosts "$(start_line)") || complete=''
  show_answers
  started=$(hosts_that started)
  [[ -n $complete ]] && ((started > 0 && started >= hosts)) && hosts=$started
}

run_with_restarts() {
  local answers='' complete='' noted='' outcome='' hosts=0 words
  command_words
  if [[ -n $dry_run ]]; then
    print_run
    return
  fi
  if ((!restarts)); then
    start_on_hosts || fail "$module did not start on all hosts; where it did it runs until 'stop'"
    return
  fi
  said=$(mktemp) # what gcloud said last beside its answer
  trap 'rm -f "$said"' EXIT
  begin
  while :; do
    if [[ -z $outcome ]]; then
      wait_for_hosts
      show_answers
    fi
    case $outcome in
      finished) return 0 ;;
      stopped) fail "$module was stopped" ;;
      failed) fail "$module failed; scripts/launch_pod.sh logs --lines=20 shows why" ;;
    esac
    start_again
    outcome=''
  done
}

# The first start. A run that another launcher began is taken up; one that is not whole is lost.
begin() {
  local looks
  for ((looks = 0; looks < 5; looks++)); do
    look
    if [[ -n $complete || -z $answers ]]; then break; fi
    sleep "$poll"
  done
  if (($(hosts_that running) > $(hosts_that_run_it))); then
    show_answers
    fail "the hosts run another command, which 'stop' would end"
  elif (($(hosts_that running))); then
    hosts=$(hosts_that '[a-z]+')
    if [[ -n $complete ]] && (($(hosts_that running) == hosts)); then
      printf '%s  %s runs on all %d hosts: it is watched from here\n' "$(date +%T)" "$module" "$hosts"
    else
      show_answers
      outcome=lost
    fi
  elif ! start_on_hosts; then
    if (($(hosts_that started))); then
      outcome=lost
    elif [[ $(slice_is) == gone ]]; then
      outcome=gone
    else
      fail "$module did not start"
    fi
  fi
}

# Starts on all hosts, in as many tries as that takes: one restart.
start_again() {
  local pause=$poll tries=0 installed=yes removed='' why=${outcome/#again/ended with 75}
  ((restarts > 0)) || fail "$module: $why, and all restarts are used up"
  printf '%s  %s: starts again, %d more times at most\n' "$(date +%T)" "$why" "$((restarts - 1))"
  case $outcome in
    gone) removed=yes ;;
    again) sleep "$poll" ;; # a slice that is taken away says so a little later
  esac
  until try_to_start; do
    ((tries < most_tries)) ||
      fail "$module did not start on all hosts in $tries tries; $name is kept, 'delete' ends it"
    sleep "$pause"
    pause=$((2 * pause < longest_pause ? 2 * pause : longest_pause))
  done
  noted=''
  restarts=$((restarts - 1))
}

# One try; fails where a later one may succeed, and counts in `tries` what hosts did not do.
try_to_start() {
  have_slice || return 1
  if [[ -z $installed ]]; then
    if ! install_on_hosts; then
      tries=$((tries + 1))
      return 1
    fi
    installed=yes
  fi
  look
  if (($(hosts_that stopped))); then
    fail "$module was stopped"
  elif [[ -z $answers ]]; then
    note "no host answers: $(gcloud_said)"
    return 1
  elif (($(hosts_that bare))); then
    [[ -n $repo ]] || fail "hosts have lost their clone: --repo is needed to install it again"
    installed=''
    return 1
  elif [[ -n $complete ]] && (($(hosts_that_run_it) == $(hosts_that '[a-z]+'))); then
    hosts=$(hosts_that_run_it) # a start that was slow to say so
    return 0
  fi
  limit=$((grace + answer_within)) on_hosts "scripts/pod/host.sh stop $grace again" > /dev/null 2>&1 || true
  if ! limit=$((15 * answer_within)) start_on_hosts; then
    tries=$((tries + 1))
    return 1
  fi
}

# Whether the slice is there; one that is gone is created again, and has then nothing installed.
have_slice() {
  local state
  state=$(slice_is)
  case $state in
    ready) return 0 ;;
    gone | absent)
      [[ $state == gone || -n $removed ]] || fail "$name was deleted"
      [[ -n $type && -n $repo ]] || fail "$name is gone: --type and --repo are needed to create it again"
      installed='' removed=yes
      if [[ $state == gone ]]; then delete_slice || return 1; fi
      create_slice && removed=''
      ;;
    deleting)
      [[ -n $removed ]] || fail "$name is being deleted"
      return 1
      ;;
    unknown)
      note "the cloud does not say how $name is: $(gcloud_said)"
      return 1
      ;;
    *)
      note "$name is $state"
      return 1
      ;;
  esac
}

# wait_for_hosts: waits until no host runs the command any more; sets answers and outcome: finished,
# stopped, failed, again (exit 75: preempted, stalled, or without one of its processes), lost (a host
# or its process), gone (the slice).
wait_for_hosts() {
  local silent=0 waited=0
  while :; do
    sleep "$poll"
    look
    if (($(hosts_that "running|$ended") < hosts)); then
      judge_silence
      if [[ -n $outcome ]]; then return; fi
      continue
    fi
    if [[ -n $noted ]]; then note "all hosts answer again"; fi
    noted='' silent=0
    if (($(hosts_that running))); then
      # A process that has joined the others ends them; for one that has not they wait for minutes.
      if (($(hosts_that "$ended_early") == 0)); then waited=0; fi
      (($(hosts_that "$ended_early") && (waited += poll) > patience)) || continue
      printf '%s  the others still run: they are stopped\n' "$(date +%T)"
      limit=$((grace + answer_within)) on_hosts "scripts/pod/host.sh stop $grace again" > /dev/null 2>&1 || true
    fi
    # A host that was killed ends the others, which exit with 75: the cause is the signal.
    if (($(hosts_that stopped))); then
      outcome=stopped
    elif (($(hosts_that 'lost|idle|ended (129|1[3-9][0-9]|2[0-9][0-9])'))); then
      outcome=lost
    elif (($(hosts_that 'ended 75'))); then
      outcome=again
    elif (($(hosts_that 'ended 0') == hosts)); then
      outcome=finished
    else
      outcome=failed
    fi
    return
  done
}

# What it means that not all hosts answered: the slice or a host is lost, or it is to be seen. Those
# that run are not disturbed: they end by themselves when they miss a host.
judge_silence() {
  local problem state heard
  problem=$(gcloud_said) heard=$(hosts_that '[a-z]+')
  state=$(slice_is)
  case $state in
    gone) outcome=gone ;;
    deleting | absent) fail "$name was deleted" ;;
    ready | unknown)
      if [[ $state == unknown && $heard -eq 0 ]]; then problem=$(gcloud_said); fi
      note "$heard of $hosts hosts answer: $problem"
      if (($(hosts_that "$ended|bare") && ++silent >= 5)); then outcome=lost; fi
      ;;
    *) note "$name is $state" ;;
  esac
}

print_run() {
  if ((restarts)); then
    echo "# where it runs already it is watched, else it is started:"
    hosts_status
  fi
  on_hosts "$(start_line)"
  ((restarts)) || return 0
  echo "# every $poll s, until no host runs it any more:"
  hosts_status
  echo "# after exit 75, and when a host or its process was lost, at most $restarts times:"
  echo "# (hosts that still run it are stopped first)"
  on_hosts "scripts/pod/host.sh stop $grace again"
  if [[ -n $type && -n $repo ]]; then
    echo "# (a slice that is gone is created and installed again)"
    delete_slice
    create_slice
    install_on_hosts
  fi
  on_hosts "$(start_line)"
}
