#!/usr/bin/env bash
# What gpu_run.sh has SLURM run on the first node of a job: preflight and run, on all nodes.
#
#   gpu_job.sh FOLDER_OF_THE_CODE PYTHON ARGUMENTS OF flip_jax.main
#
# SLURM runs a copy of this file, hence no common.sh.
set -eo pipefail

folder=$1 python=$2
shift 2
cd "$folder"
# Two ports, JAX's and the one below it for the preflight, and others for the next job.
port=$((20001 + SLURM_JOB_ID % 10000 * 2))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
FLIP_JAX_COORDINATOR=${hosts%%$'\n'*}:$port
export FLIP_JAX_COORDINATOR FLIP_JAX_PROCESSES=$SLURM_JOB_NUM_NODES PYTHONUNBUFFERED=1

on_all_nodes() {
  # shellcheck disable=SC2016  # each task's shell expands it
  srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'export FLIP_JAX_PROCESS=$SLURM_PROCID && exec "$@"' task "$@"
}

on_all_nodes "$python" -m flip_jax.preflight "$@"
on_all_nodes "$python" -m flip_jax.main "$@"
