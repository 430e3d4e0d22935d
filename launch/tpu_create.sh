#!/usr/bin/env bash
# Create a TPU slice, or several slices as one queued resource, and wait until it is there.
#
#   launch/tpu_create.sh --name NAME --zone ZONE --type TYPE [options]
#
#   --name NAME         of the slice (or set TPU_NAME)
#   --zone ZONE         for example us-central1-a (or set TPU_ZONE)
#   --project PROJECT   default: gcloud's own (or set TPU_PROJECT)
#   --type TYPE         accelerator type, for example v5litepod-256 or v6e-256
#   --runtime VERSION   of the VM image; default: the one for the type
#   --slices N          N slices of this type, NAME-0 ...; implies --queued (or set TPU_SLICES)
#   --queued            ask for a queued resource of the same name: it waits for free chips
#   --spot | --reserved instead of on demand
#   --timeout MINUTES   to wait for a queued resource; default 60; it stays in the queue after that
#   --poll SECONDS      between looks at a queued resource; default 30
#   --create-flag FLAG  given to gcloud's create as it is, for example --create-flag=--network=net;
#                       may be repeated
#   --dry-run           print the commands instead of running them
#
# Exit status: 0 ready, 2 wrong options, 3 still in the queue at the timeout, 4 the request ended
# without chips; else that of gcloud.
source "$(dirname "$0")/common.sh"

REFUSED=4

runtime_of() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) fail 2 "--type=$1: no runtime known for it; give --runtime (see gcloud compute tpus tpu-vm versions list)" ;;
  esac
}

wait_until_active() {
  local deadline=$((SECONDS + 60 * opt_timeout))
  while true; do
    describe queued-resources "$opt_name" state.state ACTIVE
    echo "$opt_name: $state"
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT)
        fail "$REFUSED" "the queued resource $opt_name is $state; look at it with gcloud compute tpus queued-resources describe, then launch/tpu_delete.sh --queued"
        ;;
    esac
    ((SECONDS < deadline)) ||
      fail "$TIMED_OUT" "$opt_name is $state after $opt_timeout min and stays in the queue; launch/tpu_delete.sh --queued takes it out"
    sleep "$opt_poll"
  done
}

parse "name zone project type runtime slices timeout poll create-flag" "queued spot reserved" "$@"
require name zone type
[[ -z $opt_spot || -z $opt_reserved ]] || fail 2 "--spot and --reserved exclude each other"
runtime=${opt_runtime:-$(runtime_of "$opt_type")}
flags=(--accelerator-type="$opt_type" ${opt_spot:+--spot} ${opt_reserved:+--reserved})

if [[ ! $opt_queued ]]; then
  tpu tpu-vm create "$opt_name" "${flags[@]}" --version="$runtime" \
    "${create_flags[@]}"
  exit
fi
if ((opt_slices == 1)); then
  flags+=(--node-id="$opt_name")
else
  flags+=(--node-count="$opt_slices" --node-prefix="$opt_name")
fi
tpu queued-resources create "$opt_name" "${flags[@]}" --runtime-version="$runtime" \
  "${create_flags[@]}"
wait_until_active
