#!/usr/bin/env bash
# Delete a slice, without asking. What is on its disks is lost; the workdir on a bucket stays.
#
#   launch/tpu_delete.sh --name NAME --zone ZONE [options]
#
#   --name, --zone, --project, --slices   as for tpu_create.sh
#   --queued            it is a queued resource: delete that and its TPU VMs
#   --dry-run           print the command instead of running it
#
# Exit status: 0 deleted, 2 wrong options; else that of gcloud.
source "$(dirname "$0")/common.sh"

parse "name zone project slices" "queued" "$@"
require name zone
if [[ $opt_queued ]]; then
  tpu queued-resources delete "$opt_name" --force --quiet
else
  tpu tpu-vm delete "$opt_name" --quiet
fi
