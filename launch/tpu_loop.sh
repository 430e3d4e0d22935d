#!/usr/bin/env bash
# Bring a run to its end whatever happens to the slice: create it, set it up, check it, run; when it
# is preempted or the run dies, again from the start. The run goes on from its last checkpoint.
#
#   launch/tpu_loop.sh --name NAME --zone ZONE --type TYPE [options] -- ARGUMENTS OF flip_jax.main
#
#   the options of tpu_create.sh, tpu_setup.sh (but --allow-dirty) and --run of tpu_run.sh, and
#   --poll SECONDS      between looks at the slice and the run; default 30
#   --retries N         new starts after the first before giving up; default 20
#   --backoff SECONDS   wait before the first new start, doubled until a run goes on; default 30
#   --dry-run           print the commands of one round instead of running them
#
# A slice that is READY and a run that is going on there are taken over, so the loop itself may be
# ended and started again. The slice is left there at the end: tpu_delete.sh.
# Exit status: 0 the run is complete, or was ended by tpu_stop.sh; 1 given up, uncommitted changes, or
# the run ended twice in a row with an error of its own (status 1 or 2); 2 wrong options.
source "$(dirname "$0")/common.sh"

LONGEST_WAIT=960 # seconds
# gcloud must not wait for an answer.
export CLOUDSDK_CORE_DISABLE_PROMPTS=1

parse "name zone project type runtime slices timeout poll create-flag bucket copy ssh-flag run retries \
backoff" "queued spot reserved" "$@"
require name zone type
((${#rest[@]})) || fail 2 "the arguments of flip_jax.main are missing; give them after --"

common=(--name "$opt_name" --zone "$opt_zone" --project "$opt_project" --slices "$opt_slices"
  ${opt_dry_run:+--dry-run})
queued=(${opt_queued:+--queued})
create=("${queued[@]}" ${opt_spot:+--spot} ${opt_reserved:+--reserved} --type "$opt_type"
  --runtime "$opt_runtime" --timeout "$opt_timeout" --poll "$opt_poll")
for flag in "${create_flags[@]}"; do create+=(--create-flag "$flag"); done
ssh=()
for flag in "${ssh_flags[@]}"; do ssh+=(--ssh-flag "$flag"); done

# script NAME ARGUMENT...: another script of this folder, for the same slice.
script() {
  local name=$1
  shift
  "$LAUNCH/$name" "${common[@]}" "$@"
}

status() { script tpu_status.sh "${queued[@]}" "${ssh[@]}" --run "$opt_run" --lines 0; }

# Sets `slice` to ready, coming, gone, absent or unknown, and `run_state` to that of the run.
look() {
  local answer resource=ACTIVE states
  slice=unknown run_state=none
  answer=$(status) || return 0
  states=$(sed -n 's/^slice: \([A-Z_]*\) .*/\1/p' <<<"$answer")
  if [[ $opt_queued ]]; then
    resource=${states%%$'\n'*} states=${states#*$'\n'}
  fi
  case $resource/$(sort -u <<<"$states" | tr '\n' ' ') in
    'ACTIVE/READY ') slice=ready ;;
    ABSENT/*) slice=absent ;;
    'ACTIVE/ABSENT ') slice=${opt_queued:+gone} slice=${slice:-absent} ;;
    SUSPENDED/* | FAILED/*) slice=gone ;;
    ACTIVE/*ABSENT* | ACTIVE/*PREEMPTED* | ACTIVE/*TERMINATED* | ACTIVE/*STOPPED* | ACTIVE/*UNKNOWN*)
      slice=gone
      ;;
    *) slice=coming ;; # on its way, or in repair
  esac
  states=$(sed -n 's/^state: \(.*\) (.*/\1/p' <<<"$answer" | sort -u)
  # The worker that failed tells more than those that wait for it.
  run_state=$(grep -m 1 -e '^failed' -e '^lost' <<<"$states" || grep -m 1 '^running' <<<"$states" ||
    grep -m 1 -e '^interrupted' -e '^stopped' <<<"$states" || head -n 1 <<<"$states")
}

# One round: whatever is missing of slice, code and run.
begin() {
  local changes
  # Before a slice is paid for: tpu_setup.sh refuses them, and no new start would mend it.
  changes=$(git -C "$ROOT" status --porcelain)
  [[ -z $changes ]] || fail 1 $'there are uncommitted changes; commit them first:\n'"$changes"
  case $slice in
    gone) script tpu_delete.sh "${queued[@]}" && script tpu_create.sh "${create[@]}" ;;
    absent) script tpu_create.sh "${create[@]}" ;;
    ready) script tpu_stop.sh "${ssh[@]}" --run "$opt_run" --grace 60 ;;
  esac &&
    script tpu_setup.sh "${ssh[@]}" --bucket "$opt_bucket" --copy "$opt_copy" &&
    script tpu_preflight.sh "${ssh[@]}" -- "${rest[@]}" &&
    script tpu_run.sh "${ssh[@]}" --run "$opt_run" -- "${rest[@]}"
}

if [[ $opt_dry_run ]]; then
  slice=absent
  begin
  status
  exit
fi

# begun: the last start got as far as a run; what `look` finds is that run's, not an earlier one's.
starts=0 begun='' pause=$opt_backoff last=''
while true; do
  look
  echo "slice: $slice, run: ${run_state:-not known}"
  case $slice/$run_state in
    ready/running)
      # Taken over from an earlier loop, or its own.
      ((starts > 0)) || starts=1
      begun=1
      pause=$opt_backoff
      sleep "$opt_poll"
      continue
      ;;
    coming/* | unknown/*)
      [[ $slice == coming ]] || ((starts > 0)) || fail 1 "cannot look at the slice; see above"
      sleep "$opt_poll"
      continue
      ;;
    ready/done | ready/stopped)
      [[ ! $begun ]] || exit 0
      ;;
    ready/failed\ [12])
      [[ ! $begun || $last != "$run_state" ]] ||
        fail 1 "the run ended twice with status ${run_state#failed }; see its log with tpu_status.sh"
      ;;
  esac
  if ((starts > 0)); then
    ((starts <= opt_retries)) || fail 1 "gave up after $opt_retries new starts"
    echo "new start $starts of $opt_retries in $pause s"
    sleep "$pause"
    pause=$((2 * pause < LONGEST_WAIT ? 2 * pause : LONGEST_WAIT))
    [[ ! $begun ]] || last=$run_state
  fi
  starts=$((starts + 1)) begun=1
  begin || {
    warn "start $starts failed with status $?"
    begun=''
  }
done
