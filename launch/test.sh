#!/usr/bin/env bash
# Install with the test extras and run the tests. Arguments go to pytest: `bash launch/test.sh -m "not slow" tests/optim`.
#   MUON_TEST_WORKERS   files that are tested at the same time (default: one per core, at least 2);
#                       0 runs one test after another, as -s and --pdb need
set -euo pipefail
# shellcheck source=launch/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    printf 'usage: [MUON_TEST_WORKERS=N] bash launch/test.sh [PYTEST ARGUMENTS]\n'
    exit 0
fi

muon_env test
# One thread per process, because the tests start several processes on few cores. The other variables keep DeepSpeed
# from compiling on a CPU.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
# The order is that of tests/conftest.py: the longest files first.
cores="$(nproc 2>/dev/null || printf 2)"
exec python -m pytest -n "${MUON_TEST_WORKERS:-$((cores > 2 ? cores : 2))}" --dist loadfile --no-loadscope-reorder "$@"
