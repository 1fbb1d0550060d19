#!/usr/bin/env bash
# Train on several nodes without SLURM: run this on each of them, with the same arguments.
#   NODES=2 HEAD=10.0.0.1 launch/multinode.sh model=gpt_moe_s name=gpt-s
#   DEVICES=4 PORT=29600 RESTARTS=3 NODES=2 HEAD=10.0.0.1 launch/multinode.sh name=long
# HEAD is an address of one of the nodes, which the others reach at PORT (29500). DEVICES is the number of processes of a
# node (default: its GPUs; 2 without any). The nodes share the folder of the runs. All else is as in torchrun.sh.
set -euo pipefail
: "${NODES:?set it to the number of nodes}" "${HEAD:?set it to the address of one of them}"

export MEET="--nnodes $NODES --rdzv-backend c10d --rdzv-endpoint $HEAD:${PORT:-29500} --rdzv-id ${ID:-hecate}"
exec "$(dirname "$0")/torchrun.sh" "$@"
