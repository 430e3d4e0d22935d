#!/usr/bin/env bash
# Check on all workers at once that a run may start: python -m flip_jax.preflight.
#
#   launch/tpu_preflight.sh --name NAME --zone ZONE [options] -- ARGUMENTS OF flip_jax.main
#
#   --name, --zone, --project, --slices, --ssh-flag   as for tpu_setup.sh
#   --dry-run           print the command instead of running it
#
# After -- stands what flip_jax.main will get, for example --config configs/base.py; there may also
# be --timeout SECONDS.
# Exit status: 0 all is well, 1 a check failed, 2 wrong options, 3 a process is missing or hangs;
# else that of gcloud.
source "$(dirname "$0")/common.sh"

parse "name zone project slices ssh-flag" "" "$@"
require name zone
((${#rest[@]})) || fail 2 "the arguments of flip_jax.main are missing; give them after --"
worker_sh preflight "${rest[@]}"
