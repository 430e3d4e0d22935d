#!/usr/bin/env bash
# What the slice and the run on each of its workers are doing.
#
#   launch/tpu_status.sh --name NAME --zone ZONE [options]
#
#   --name, --zone, --project, --slices, --ssh-flag   as for tpu_setup.sh
#   --queued            the slice is a queued resource
#   --run RUN           name of the run; default train
#   --lines N           of each worker's log; default 5
#   --dry-run           print the commands instead of running them
#
# The first lines begin with `slice:` and name the state that Cloud TPU gives; after them one of
# every worker begins with `state:`, see launch/worker.sh. Workers are asked only if all is READY.
# Exit status: 0 answered, 2 wrong options; else that of gcloud.
source "$(dirname "$0")/common.sh"

parse "name zone project slices run lines ssh-flag" "queued" "$@"
require name zone
ready=1
if [[ $opt_queued ]]; then
  describe queued-resources "$opt_name" state.state ACTIVE
  echo "slice: $state (queued resource $opt_name)"
  [[ $state == ACTIVE ]] || ready=''
fi
while IFS= read -r node; do
  describe tpu-vm "$node" state READY
  echo "slice: $state (TPU VM $node)"
  [[ $state == READY ]] || ready=''
done < <(nodes)
[[ ! $ready ]] || worker_sh status "$opt_run" "$opt_lines"
