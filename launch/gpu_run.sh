#!/usr/bin/env bash
# Submit a run on GPU nodes to SLURM: one process per node, with all GPUs of the node.
#
#   launch/gpu_run.sh --nodes N --gpus G --cpus C [options] -- ARGUMENTS OF flip_jax.main
#
#   --nodes N           nodes
#   --gpus G            GPUs of each
#   --cpus C            CPU cores of each, for decoding
#   --run RUN           name of the job; its log is RUN-JOBID.log in the folder of submission;
#                       default train
#   --python PYTHON     interpreter that has flip_jax on all nodes; default: the one found now
#   --sbatch-flag FLAG  given to sbatch as it is, for example --sbatch-flag=--partition=gpu; may be
#                       repeated
#   --dry-run           print the command instead of running it
#
# The job runs flip_jax.preflight, then flip_jax.main. SLURM sends SIGTERM two minutes before the
# time limit and at a preemption, on which a run saves; the same command goes on from there.
# `scancel --signal=TERM JOBID` does it by hand.
# Exit status: 0 submitted, 2 wrong options; else that of sbatch.
source "$(dirname "$0")/common.sh"

parse "nodes gpus cpus run python sbatch-flag" "" "$@"
require nodes gpus cpus
((${#rest[@]})) || fail 2 "the arguments of flip_jax.main are missing; give them after --"
python=${opt_python:-$(command -v python3)} || fail 2 "no python3 here; give --python"
run sbatch --nodes="$opt_nodes" --ntasks-per-node=1 --gpus-per-node="$opt_gpus" \
  --cpus-per-task="$opt_cpus" --job-name="$opt_run" --output=%x-%j.log --open-mode=append \
  --requeue --signal=TERM@120 "${sbatch_flags[@]}" \
  "$LAUNCH/gpu_job.sh" "$ROOT" "$python" "${rest[@]}"
