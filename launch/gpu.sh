#!/usr/bin/env bash
# Tests and measurements of this GPU: exactness, memory, host waits, kernels, speed, NCCL with two or more cards, and
# `muon-dist doctor`. Ten minutes on one GPU. Arguments go to pytest.
#   MUON_DIST_SMOKE_DEVICE   cuda (default) or cpu: the same tests on the CPU
#   MUON_DIST_GPU_FOLDER     folder for gpu.json, gpu.md and gpu.html (default bench/gpu)
set -euo pipefail
# shellcheck source=launch/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    printf 'usage: [MUON_DIST_SMOKE_DEVICE=cpu] bash launch/gpu.sh [PYTEST ARGUMENTS]\n'
    exit 0
fi

muon_env test
export MUON_DIST_SMOKE_DEVICE="${MUON_DIST_SMOKE_DEVICE:-cuda}"
folder="${MUON_DIST_GPU_FOLDER:-bench/gpu}"
mkdir -p -- "$folder"
export MUON_DIST_SMOKE_OUTPUT="$folder/gpu.json"
rm -f -- "$MUON_DIST_SMOKE_OUTPUT"
if [[ "$MUON_DIST_SMOKE_DEVICE" == cuda ]]; then
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        muon_die "torch sees no GPU here: \`muon-dist doctor\` says why. MUON_DIST_SMOKE_DEVICE=cpu runs the tests on the CPU"
fi
muon-dist doctor || muon_log "doctor found problems, see above; continuing"
status=0
python -m pytest -m gpu tests/gpu "$@" || status=$?
[[ ! -e "$MUON_DIST_SMOKE_OUTPUT" ]] || python -m tests.gpu.page "$folder"
exit "$status"
