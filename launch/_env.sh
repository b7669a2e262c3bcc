# shellcheck shell=bash
# Sourced by the other scripts, from any folder. `muon_env EXTRAS` makes (or reuses) the Python environment, installs
# this checkout into it with the named extras, puts it first in PATH and leaves the shell in the repository root.
#
#   VIRTUAL_ENV   an active environment is reused; else .venv in the repository root
#   PYTHON        the interpreter that makes .venv (default python3)
#   MUON_DIST_INSTALL=0   install nothing: PYTHON has all packages already (a container, a cluster without a network)

MUON_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

muon_log() { printf '[muon-dist] %s\n' "$*" >&2; }

muon_die() {
    muon_log "error: $*"
    exit 1
}

# The constraints for pip, a path. Beside an NVIDIA GPU torch and triton are not pinned: its driver decides which CUDA
# build fits. A torch that can already be imported stays: its own version is pinned, so that pip does not replace it.
muon_constraints() {
    local venv="$1" torch
    torch="$("$venv/bin/python" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null || true)"
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        grep -v -E '^(torch|triton)==' launch/constraints-cpu.txt >"$venv/muon-dist-constraints.txt"
        [[ -z "$torch" ]] || printf 'torch==%s\n' "$torch" >>"$venv/muon-dist-constraints.txt"
        printf '%s\n' "$venv/muon-dist-constraints.txt"
    elif [[ -z "$torch" || "$torch" == "2.13.0" ]]; then
        printf '%s\n' launch/constraints-cpu.txt
    else
        grep -v '^torch==' launch/constraints-cpu.txt >"$venv/muon-dist-constraints.txt"
        printf 'torch==%s\n' "$torch" >>"$venv/muon-dist-constraints.txt"
        printf '%s\n' "$venv/muon-dist-constraints.txt"
    fi
}

# Runs this checkout with a Python that has all packages: `python` and `muon-dist` are put first in PATH.
muon_as_it_is() {
    local python bin
    python="$(command -v "$1")" || muon_die "MUON_DIST_INSTALL=0, but there is no $1 (set PYTHON)"
    "$python" -c 'import accelerate, datasets, deepspeed, pydantic, sentencepiece, transformers' ||
        muon_die "MUON_DIST_INSTALL=0, but $python lacks the package named above"
    bin="$(mktemp -d)"
    printf '#!/bin/sh\nexec %q "$@"\n' "$python" >"$bin/python"
    printf '#!/bin/sh\nexec %q -m muon_dist.cli "$@"\n' "$python" >"$bin/muon-dist"
    chmod +x "$bin/python" "$bin/muon-dist"
    export PATH="$bin:$PATH" PYTHONPATH="$MUON_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    muon_log "MUON_DIST_INSTALL=0: nothing is installed, $python runs this checkout"
}

muon_env() {
    local extras="${1:-}" venv stamp want target constraints
    local -a command
    cd "$MUON_ROOT" || exit 1
    if [[ "${MUON_DIST_INSTALL:-1}" == 0 ]]; then
        muon_as_it_is "${PYTHON:-python3}"
        return
    fi
    venv="${VIRTUAL_ENV:-$MUON_ROOT/.venv}"
    if [[ ! -x "$venv/bin/python" ]]; then
        muon_log "making the environment $venv (plain: ${PYTHON:-python3} -m venv $(printf '%q' "$venv"))"
        "${PYTHON:-python3}" -m venv "$venv" || muon_die "cannot make $venv; on Debian: apt-get install python3-venv"
        # The pip that comes with Python 3.11 takes half a minute longer to choose the versions.
        "$venv/bin/python" -m pip install --quiet --quiet --upgrade pip ||
            muon_log "pip could not be upgraded; going on with it"
    fi
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || muon_die "$venv has $("$venv/bin/python" --version); Python 3.11 or newer is needed (set PYTHON)"
    # pip would compile all 17,000 files, one after another. Python compiles the third of them that is imported, and
    # keeps the result unless this variable, which containers set, forbids it.
    unset PYTHONDONTWRITEBYTECODE
    target="."
    [[ -z "$extras" ]] || target=".[$extras]"
    # One stamp for each set of extras; it is out of date when what is installed from has changed or moved.
    stamp="$venv/.muon-dist-installed-${extras:-core}"
    want="$(cat pyproject.toml launch/constraints-cpu.txt <(printf '%s' "$MUON_ROOT") | cksum)"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$want" ]]; then
        muon_log "already installed in $venv"
    else
        constraints="$(muon_constraints "$venv")"
        command=("$venv/bin/python" -m pip install --quiet --quiet --no-compile -e "$target" -c "$constraints")
        muon_log "installing, which takes a few minutes; plain: $(printf '%q ' "${command[@]}")"
        "${command[@]}" </dev/null || muon_die "pip failed; the command above shows it"
        printf '%s\n' "$want" >"$stamp"
    fi
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}
