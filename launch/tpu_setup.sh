#!/usr/bin/env bash
# Bring this commit and its pinned packages to every worker of a slice.
#
#   launch/tpu_setup.sh --name NAME --zone ZONE [options]
#
#   --name, --zone, --project, --slices   as for tpu_create.sh
#   --bucket BUCKET     mount this Cloud Storage bucket at /mnt/BUCKET
#   --copy FOLDER       copy this folder of the bucket to ~/data/FOLDER, for records that fit a disk
#   --allow-dirty       uncommitted changes of tracked files go along; untracked files never do
#   --ssh-flag FLAG     given to gcloud's ssh and scp as it is, for example --ssh-flag=--internal-ip;
#                       may be repeated
#   --dry-run           print the commands instead of running them
#
# The code goes to ~/flip_jax, its Python environment to ~/flip_jax_env. No git remote is needed.
# Refused while a run is going on there.
# Exit status: 0 done, 1 uncommitted changes, 2 wrong options; else that of gcloud or of a worker.
source "$(dirname "$0")/common.sh"

copy_to() {
  tpu tpu-vm scp "$2" "$1:flip_jax.tar.gz" --worker=all "${ssh_flags[@]}"
}

parse "name zone project slices bucket copy ssh-flag" "allow-dirty" "$@"
require name zone
[[ -z $opt_copy || $opt_bucket ]] || fail 2 "--copy=$opt_copy needs the --bucket that it is in"

commit=$(git -C "$ROOT" rev-parse HEAD)
changes=$(git -C "$ROOT" status --porcelain)
source=HEAD
if [[ $changes ]]; then
  [[ $opt_allow_dirty ]] ||
    fail 1 $'there are uncommitted changes; commit them, or add --allow-dirty:\n'"$changes"
  # A commit object of the tracked files as they are; it touches neither files nor branches.
  source=$(git -C "$ROOT" -c user.name=flip_jax -c user.email=flip_jax@localhost stash create)
  source=${source:-HEAD} commit=$commit-dirty
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
run git -C "$ROOT" archive --format=tar.gz --output="$folder/flip_jax.tar.gz" "$source"
each_node copy_to "$folder/flip_jax.tar.gz"
# shellcheck disable=SC2016  # the worker's shell expands it
on_workers bash -c 'rm -rf flip_jax.new && mkdir flip_jax.new &&
tar -xzf flip_jax.tar.gz -C flip_jax.new && bash flip_jax.new/launch/worker.sh setup "$@"' \
  setup "$commit" "$opt_bucket" "$opt_copy"
