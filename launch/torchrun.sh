#!/usr/bin/env bash
# Train on one node: DEVICES processes (default: all GPUs; 2 without any), then any key=value of conf/config.yaml.
#   launch/torchrun.sh policy=ep name=ep
#   DEVICES=4 launch/torchrun.sh model=bert_moe_tiny
set -euo pipefail
: "${PYTHON:=python3}"

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
DEVICES=${DEVICES:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# One node: gloo needs no other interface, and no host name that resolves.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}

exec "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$DEVICES" \
  -m hecate.train devices="$DEVICES" "$@"
