# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this file use the variables
# What the scripts beside this file share. They are bash, and everything that a user gives is
# passed on quoted, never evaluated here.

# Not -u: bash 3.2, which macOS has, takes an empty array for an unset one.
set -eo pipefail

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LAUNCH")
PROGRAM=$(basename "$0")
TIMED_OUT=3

# Options, by their names with _ for -. The environment spares typing the first four.
opt_name=${TPU_NAME-} opt_zone=${TPU_ZONE-} opt_project=${TPU_PROJECT-} opt_slices=${TPU_SLICES:-1}
opt_dry_run='' opt_type='' opt_runtime='' opt_queued='' opt_spot='' opt_reserved=''
opt_timeout=60 opt_poll=30 opt_backoff=30 opt_retries=20 opt_grace=900 opt_lines=5
opt_run=train opt_follow='' opt_allow_dirty='' opt_bucket='' opt_copy=''
opt_nodes='' opt_gpus='' opt_cpus='' opt_python=''
create_flags=() ssh_flags=() sbatch_flags=() rest=() state=''

warn() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

# fail STATUS MESSAGE
fail() {
  warn "$2"
  exit "$1"
}

# The comment at the head of the script that was started.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# parse VALUES SWITCHES ARGUMENT...: sets opt_NAME for each option. VALUES and SWITCHES are the
# names that this script knows, with and without a value. What follows `--` goes to `rest`.
parse() {
  local values=" $1 " switches=" $2 dry-run " option
  shift 2
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        rest=("$@")
        break
        ;;
      --*=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
    esac
    option=${1#--}
    if [[ $1 == --* && $switches == *" $option "* ]]; then
      printf -v "opt_${option//-/_}" 1
    elif [[ $1 == --* && $values == *" $option "* ]]; then
      (($# >= 2)) || fail 2 "$1 needs a value; see --help"
      case $option in
        create-flag) create_flags+=("$2") ;;
        ssh-flag) ssh_flags+=("$2") ;;
        sbatch-flag) sbatch_flags+=("$2") ;;
        *) printf -v "opt_${option//-/_}" '%s' "$2" ;;
      esac
      shift
    else
      fail 2 "unknown argument $1; see --help (arguments of flip_jax.main stand after --)"
    fi
    shift
  done
  check_numbers
}

check_numbers() {
  local option value
  for option in slices timeout poll backoff retries grace lines; do
    value=opt_$option
    [[ ${!value} =~ ^[0-9]+$ ]] || fail 2 "--$option=${!value}: must be a whole number"
  done
  ((opt_slices >= 1)) || fail 2 "--slices=$opt_slices: must be at least 1"
  [[ $opt_run != */* && $opt_run != .* && -n $opt_run ]] ||
    fail 2 "--run=$opt_run: must be the name of a folder, without /"
  # Several slices are one queued resource.
  ((opt_slices == 1)) || opt_queued=1
}

# require OPTION...: the options must have been given.
require() {
  local option value
  for option in "$@"; do
    value=opt_$option
    [[ -n ${!value} ]] && continue
    case $option in
      name | zone) fail 2 "--$option is missing; give it, or set TPU_$(tr '[:lower:]' '[:upper:]' <<<"$option")" ;;
      *) fail 2 "--$option is missing; see --help" ;;
    esac
  done
}

# The words of a command, quoted for a shell.
quoted() {
  local line
  printf -v line ' %q' "$@"
  printf '%s\n' "${line:1}"
}

# Runs a command; with --dry-run prints it.
run() { if [[ $opt_dry_run ]]; then quoted "$@"; else "$@"; fi; }

# tpu KIND ACTION ARGUMENT...: gcloud compute tpus, in the zone and project of the options.
tpu() {
  local status=0
  run gcloud compute tpus "$@" --zone="$opt_zone" ${opt_project:+"--project=$opt_project"} ||
    status=$?
  ((status == 0)) || warn "gcloud compute tpus $1 $2 failed with status $status"
  return "$status"
}

# The names of the TPU VMs, a line each.
nodes() {
  local slice
  if ((opt_slices == 1)); then
    printf '%s\n' "$opt_name"
  else
    for ((slice = 0; slice < opt_slices; slice++)); do printf '%s-%d\n' "$opt_name" "$slice"; done
  fi
}

# each_node FUNCTION ARGUMENT...: FUNCTION NODE ARGUMENT... for all TPU VMs at once; the status of
# the last that failed. Alone it stays in the foreground, where Ctrl-C reaches it.
each_node() {
  local action=$1 node status=0 pid pids=()
  shift
  while IFS= read -r node; do
    if [[ $opt_slices == 1 || $opt_dry_run ]]; then
      "$action" "$node" "$@" || status=$?
    else
      "$action" "$node" "$@" &
      pids+=("$!")
    fi
  done < <(nodes)
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

# on NODE WORKERS WORD...: the command WORD... in the home folder of the node's workers.
on() {
  local node=$1 workers=$2
  shift 2
  tpu tpu-vm ssh "$node" --worker="$workers" --command="$(quoted "$@")" \
    "${ssh_flags[@]}" </dev/null
}

all_workers_of() {
  local node=$1
  shift
  on "$node" all "$@"
}

# on_workers WORD...: on all workers of all slices at once.
on_workers() { each_node all_workers_of "$@"; }

# worker_sh ACTION ARGUMENT...: launch/worker.sh, as tpu_setup.sh copied it, on all workers.
worker_sh() { on_workers bash flip_jax/launch/worker.sh "$@"; }

# describe KIND NAME FIELD DRY: sets `state` to a field of a resource, ABSENT if there is none of that
# name; with --dry-run to DRY.
describe() {
  local status=0 command
  command=(gcloud compute tpus "$1" describe "$2" --format="value($3)" --zone="$opt_zone"
    ${opt_project:+"--project=$opt_project"})
  if [[ $opt_dry_run ]]; then
    quoted "${command[@]}"
    state=$4
    return
  fi
  state=$("${command[@]}" 2>&1) || status=$?
  if ((status == 0)); then
    state=${state##*$'\n'} # warnings stand above
  elif [[ $state == *NOT_FOUND* ]]; then
    state=ABSENT
  else
    warn "gcloud compute tpus $1 describe failed with status $status: $state"
    return "$status"
  fi
}
