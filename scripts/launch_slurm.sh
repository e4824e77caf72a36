#!/usr/bin/env bash
# Train on several machines under Slurm:
#
#   sbatch --nodes 4 scripts/launch_slurm.sh --stage all --config configs/qwen2vl_72b_to_7b.yaml [--field value ..]
#
# Submit it from the repository, in the environment that has vlsi-fast (sbatch hands it on). Models, data and output_dir
# must be on a file system that all machines see. Add --max_hours 11.5 to a job of 12 hours: a checkpoint is then saved
# before Slurm ends it.
#
#SBATCH --job-name=vlsi
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=vlsi-%j.log
#SBATCH --requeue
# One task a machine: torchrun starts that machine's ranks.
set -euo pipefail

: "${SLURM_JOB_NODELIST:?start this with sbatch}"
cd "$SLURM_SUBMIT_DIR"

# sed, not head: head leaves early, and then scontrol dies of a broken pipe and, under pipefail, the script with it
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on one machine must not meet
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A job that Slurm starts again (a machine failed, or it was preempted) continues by itself.
resume=()
if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 ]]; then
  resume=(--resume)
fi

# --kill-on-bad-exit: one machine's failure ends the others, which would otherwise wait for it.
# shellcheck disable=SC2016  # SLURM_NODEID is expanded on each machine, not here
exec srun --kill-on-bad-exit=1 bash -c 'exec torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --node-rank "$SLURM_NODEID" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" vlsi_fast/train.py "$@"' train "$@" "${resume[@]}"
