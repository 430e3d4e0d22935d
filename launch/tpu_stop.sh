#!/usr/bin/env bash
# End a run on all workers: SIGTERM, on which it saves a checkpoint, SIGKILL if that takes too long.
#
#   launch/tpu_stop.sh --name NAME --zone ZONE [options]
#
#   --name, --zone, --project, --slices, --ssh-flag   as for tpu_setup.sh
#   --run RUN           name of the run; default train
#   --grace SECONDS     from SIGTERM to SIGKILL; default 900 (an evaluation is finished first)
#   --dry-run           print the command instead of running it
#
# Only the process that tpu_run.sh started is ended; the slice stays, and costs money: tpu_delete.sh.
# Exit status: 0 nothing runs any more, 2 wrong options; else that of gcloud.
source "$(dirname "$0")/common.sh"

parse "name zone project slices run grace ssh-flag" "" "$@"
require name zone
worker_sh stop "$opt_run" "$opt_grace"
