#!/usr/bin/env bash
# Train on several machines by DeepSpeed's own launcher. Start it on ONE of them:
#
#   scripts/launch_hostfile.sh HOSTFILE --stage all --config configs/qwen2vl_72b_to_7b.yaml [--resume] [--field value]
#
# HOSTFILE has a line for each machine, the first being where rank 0 runs:   node1 slots=8
# Needed: ssh without password from here to every machine, pdsh here, this repository, its environment, the models, the
# data and output_dir under the same paths everywhere (a shared file system, see docs/scaling.md).
#
# MASTER_ADDR (address of the first machine that all can reach) and MASTER_PORT may be set in the environment.
set -euo pipefail

if [[ $# -lt 3 || ! -f $1 ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
hostfile=$(realpath "$1")
shift
cd "$(dirname "$0")/.."

# DeepSpeed passes variables that begin with NCCL or PYTHON to the other machines; others through ~/.deepspeed_env.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

arguments=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
if [[ -n ${MASTER_ADDR:-} ]]; then
  arguments+=(--master_addr "$MASTER_ADDR")
fi
exec deepspeed "${arguments[@]}" vlsi_fast/train.py "$@"
