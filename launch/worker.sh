#!/usr/bin/env bash
# The part of the launch scripts that runs on each worker; they start it over ssh.
#
#   worker.sh setup COMMIT BUCKET FOLDER
#                                     install the code that was unpacked in ~/flip_jax.new, mount
#                                     the bucket, copy its folder; both may be empty
#   worker.sh preflight ARGUMENT...   python -m flip_jax.preflight
#   worker.sh start RUN ARGUMENT...   python -m flip_jax.main in the background
#   worker.sh status RUN LINES        a line that begins with `state:`, then the end of the log
#   worker.sh follow RUN              print the log until the run ends; its exit status
#   worker.sh stop RUN SECONDS        SIGTERM, which saves; SIGKILL when the seconds are over
#
# States: none (never started), running, done, interrupted (saved by a signal that was not ours),
# stopped (by `stop`), failed STATUS, lost (ended without a trace, as after a reboot).
# A run keeps its process number, exit status and log in ~/flip_jax_runs/RUN.
set -euo pipefail

CODE=$HOME/flip_jax
ENVIRONMENT=$HOME/flip_jax_env
PYTHON=$ENVIRONMENT/bin/python
RUNS=$HOME/flip_jax_runs
# What flip_jax.main logs when a signal ended a run before its last step.
STOPPED_EARLY='stopped: step'

fail() {
  printf '%s: %s\n' "$(hostname)" "$1" >&2
  exit 1
}

# alive FOLDER: is the process of its pid file there, and is it ours?
alive() {
  local number words
  number=$(cat "$1/pid" 2>/dev/null) && [[ $number ]] || return
  words=$(tr '\0' ' ' 2>/dev/null <"/proc/$number/cmdline") || return
  [[ $words == *flip_jax.main* ]]
}

refuse_if_running() {
  local folder
  for folder in "$RUNS"/*/; do
    ! alive "$folder" ||
      fail "run $(basename "$folder") is process $(cat "$folder/pid"); end it with launch/tpu_stop.sh"
  done
}

setup() {
  local commit=$1 bucket=$2 folder=$3
  refuse_if_running
  rm -rf "$CODE"
  mv "$CODE.new" "$CODE"
  printf '%s\n' "$commit" >"$CODE/.commit"
  [[ -x $PYTHON ]] || make_environment
  "$PYTHON" -m pip install --quiet --editable "${CODE}[tpu]"
  [[ -z $bucket ]] || mount_bucket "$bucket"
  [[ -z $folder ]] || copy_folder "$bucket" "$folder"
  echo "$(hostname): flip_jax $commit, $("$PYTHON" --version)"
}

# The images' own Python may be older than flip_jax needs.
make_environment() {
  if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python3 -m venv "$ENVIRONMENT"
  else
    python3 -m pip install --quiet --user uv
    "$HOME/.local/bin/uv" venv --quiet --seed --python 3.12 "$ENVIRONMENT"
  fi
}

mount_bucket() {
  local bucket=$1 folder=/mnt/$1
  ! mountpoint -q "$folder" || return 0
  command -v gcsfuse >/dev/null || install_gcsfuse
  sudo mkdir -p "$folder"
  sudo chown "$(id -u):$(id -g)" "$folder"
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$bucket" "$folder"
}

copy_folder() {
  local bucket=$1 folder=$2
  mkdir -p "$HOME/data/$folder"
  gcloud storage rsync --recursive "gs://$bucket/$folder" "$HOME/data/$folder"
  echo "$(hostname): gs://$bucket/$folder is $HOME/data/$folder"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  curl -fsS "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -q
  sudo apt-get install -q -y gcsfuse
}

preflight() {
  refuse_if_running
  cd "$CODE"
  FLIP_JAX_DISTRIBUTED=auto exec "$PYTHON" -m flip_jax.preflight "$@"
}

start() {
  local run=$1 folder=$RUNS/$1
  shift
  refuse_if_running
  [[ -x $PYTHON ]] || fail "no $PYTHON; launch/tpu_setup.sh makes it"
  mkdir -p "$folder"
  rm -f "$folder"/{pid,status,stopped}
  [[ ! -f $folder/log ]] || mv "$folder/log" "$folder/log.$(date +%Y%m%dT%H%M%S)"
  cd "$CODE"
  # A session of its own: the end of this one does not end it.
  FLIP_JAX_DISTRIBUTED=auto PYTHONUNBUFFERED=1 setsid bash "$CODE/launch/worker.sh" attend \
    "$folder" "$PYTHON" -m flip_jax.main "$@" >"$folder/log" 2>&1 </dev/null &
  until [[ -s $folder/pid || -s $folder/status ]]; do sleep 0.1; done
  echo "$(hostname): run $run is process $(cat "$folder/pid"), log $folder/log"
}

# Started by `start` only: runs the command and leaves its process number and exit status.
attend() {
  local folder=$1 status=0
  shift
  "$@" &
  echo "$!" >"$folder/pid"
  wait "$!" || status=$?
  echo "$status" >"$folder/status"
}

state() {
  local folder=$1 status
  if [[ ! -d $folder ]]; then
    echo none
  elif alive "$folder"; then
    echo running
  elif ! status=$(cat "$folder/status" 2>/dev/null); then
    echo lost
  elif [[ -f $folder/stopped && $status =~ ^(0|137|143)$ ]]; then
    echo stopped # 137, 143: by SIGKILL, or by SIGTERM before the run heeded it
  elif ((status != 0)); then
    echo "failed $status"
  elif [[ $(tail -n 20 "$folder/log") == *"$STOPPED_EARLY"* ]]; then
    echo interrupted
  else
    echo "done"
  fi
}

status() {
  local folder=$RUNS/$1
  echo "state: $(state "$folder") ($(hostname), run $1)"
  if (($2 > 0)) && [[ -f $folder/log ]]; then tail -n "$2" "$folder/log"; fi
}

follow() {
  local folder=$RUNS/$1
  [[ -f $folder/log ]] || fail "no run $1 was started here"
  tail -n +1 --pid="$(cat "$folder/pid")" -f "$folder/log"
  # The exit status is written a moment after the process has gone.
  sleep 1
  status "$1" 0
  return "$(cat "$folder/status" 2>/dev/null || echo 1)"
}

stop() {
  local folder=$RUNS/$1 seconds=$2 number
  if alive "$folder"; then
    number=$(cat "$folder/pid")
    touch "$folder/stopped"
    kill -TERM "$number"
    while alive "$folder" && ((seconds-- > 0)); do sleep 1; done
    if alive "$folder"; then
      # The whole session: its decoding processes would hold memory and devices.
      kill -KILL -- "-$(ps -o pgid= -p "$number" | tr -d ' ')"
      echo 137 >"$folder/status"
      echo "$(hostname): killed; what came after the last checkpoint is lost" >&2
    fi
  fi
  status "$1" 0
}

action=$1
shift
"$action" "$@"
