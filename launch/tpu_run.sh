#!/usr/bin/env bash
# Start flip_jax.main on all workers, in the background: it goes on when the connection ends.
#
#   launch/tpu_run.sh --name NAME --zone ZONE [options] -- ARGUMENTS OF flip_jax.main
#
#   --name, --zone, --project, --slices, --ssh-flag   as for tpu_setup.sh
#   --run RUN           name of the run, a folder of its log; default train
#   --follow            print worker 0's log until the run ends; Ctrl-C ends only the printing
#   --dry-run           print the commands instead of running them
#
# A slice runs one thing at a time; another is refused.
# Exit status: 0 started (with --follow: that of the run), 1 refused, 2 wrong options; else that of
# gcloud.
source "$(dirname "$0")/common.sh"

parse "name zone project slices run ssh-flag" "follow" "$@"
require name zone
((${#rest[@]})) || fail 2 "the arguments of flip_jax.main are missing; give them after --"
worker_sh start "$opt_run" "${rest[@]}"
if [[ $opt_follow ]]; then
  IFS= read -r first < <(nodes)
  on "$first" 0 bash flip_jax/launch/worker.sh follow "$opt_run"
fi
