#!/usr/bin/env bash
# From nothing to a trained model: environment, install, then a two-process pretraining run with Muon on the English
# text of the Python standard library. Arguments are configuration overrides: bash launch/quickstart.sh optimizer.name=adamw
set -euo pipefail
# shellcheck source=launch/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    printf 'usage: bash launch/quickstart.sh [OVERRIDES], for example optimizer.name=adamw trainer.max_steps=50\n'
    exit 0
fi

muon_env
muon_log "training on ${NPROC_PER_NODE:=2} processes; plain: bash launch/torchrun.sh --nproc-per-node $NPROC_PER_NODE train configs/quickstart.yaml --overwrite"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec bash launch/torchrun.sh --nnodes 1 --nproc-per-node "$NPROC_PER_NODE" train configs/quickstart.yaml --overwrite "$@"
