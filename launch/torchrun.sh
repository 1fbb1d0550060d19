#!/usr/bin/env bash
# Train on one node: DEVICES processes (default: all GPUs; 2 without any), then any key=value of conf/config.yaml.
#   launch/torchrun.sh policy=ep name=ep
#   DEVICES=4 launch/torchrun.sh model=bert_moe_tiny
#   RESTARTS=3 launch/torchrun.sh name=long      # where a process dies, all start again from the newest checkpoint
# SIGTERM or SIGUSR1 to torchrun makes all processes save and exit, for which they have SHUTDOWN seconds; torchrun's own
# exit code is then 1. (A signal to one process alone does too, but to torchrun that is a failure, and it may restart.)
# On several nodes: launch/multinode.sh, which says in MEET how the nodes find each other.
set -euo pipefail
: "${PYTHON:=python3}" "${RESTARTS:=0}" "${SHUTDOWN:=120}"

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
DEVICES=${DEVICES:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ -z "${MEET:-}" ]; then
  MEET="--standalone --local-addr 127.0.0.1"
  # One node: gloo needs no other interface, and no host name that resolves.
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
fi

# shellcheck disable=SC2086  # MEET is several words
exec "$PYTHON" -m torch.distributed.run $MEET --nproc-per-node "$DEVICES" \
  --max-restarts "$RESTARTS" --shutdown-timeout "$SHUTDOWN" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m hecate.train "$@"
