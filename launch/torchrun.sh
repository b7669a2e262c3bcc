#!/usr/bin/env bash
# Run muon-dist (or a script) with torchrun on any number of nodes; see --help.
set -euo pipefail
# shellcheck source=launch/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh [OPTIONS] [--] COMMAND [ARGUMENTS]

COMMAND is a muon-dist command (train configs/llama-60m.yaml), a script (my_train.py) or a module (-m my.module).

  --nnodes N            number of nodes, or MIN:MAX (elastic)    NNODES          1
  --node-rank R         this node's number, static rendezvous    NODE_RANK       0
  --nproc-per-node P    processes on this node                   NPROC_PER_NODE  one per visible GPU, else 1
  --master-addr HOST    the first node                           MASTER_ADDR     127.0.0.1
  --master-port PORT    free port on the first node              MASTER_PORT     29500
  --rdzv BACKEND        static, or c10d (nodes may start in any order; no node rank)
                                                                 RDZV_BACKEND    static, c10d when elastic
  --rdzv-id ID          name of the job, the same on all nodes   RDZV_ID         muon-dist
  --rdzv-conf K=V,...   settings of the c10d rendezvous          RDZV_CONF       none
  --max-restarts N      restarts after a failure                 MAX_RESTARTS    0, 3 when elastic

The third column is the environment variable with the same effect, the last column the default. torchrun's own variables
(PET_NNODES and so on), which Kubeflow sets, are used if neither is given. Run the script once on every node:

  bash launch/torchrun.sh --nproc-per-node 2 train configs/quickstart.yaml
  bash launch/torchrun.sh --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 train configs/llama-1b.yaml   # first node
  bash launch/torchrun.sh --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 train configs/llama-1b.yaml   # second node

Elastic: the run begins with MAX nodes, or with at least MIN if no other node joins for last_call_timeout (30 s). If
a node is lost, the processes of the other nodes fail after trainer.ddp_timeout, and torchrun restarts the processes on the
remaining nodes. To continue from the newest checkpoint, the command needs --resume if-any, and the configuration needs
data.global_batch_size, which keeps the batch of a step equal:

  bash launch/torchrun.sh --nnodes 2:4 --master-addr 10.0.0.1 train configs/llama-1b.yaml --resume if-any

The first node holds the rendezvous: if it is lost, the run ends, and the same command starts it again.

On one node no port is open to other machines: the processes meet in a file. With several nodes the store of
torch.distributed listens on every interface of the first node, without a password: use a private network.
GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface (lo while the first node is 127.0.0.1).
TEXT
}

# Kubeflow sets torchrun's own variables: PET_ and the name of an option.
endpoint="${PET_RDZV_ENDPOINT:-}"
nnodes="${NNODES:-${PET_NNODES:-1}}"
node_rank="${NODE_RANK:-${PET_NODE_RANK:-0}}"
nproc="${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-}}"
addr="${MASTER_ADDR:-${PET_MASTER_ADDR:-${endpoint%:*}}}"
port="${MASTER_PORT:-${PET_MASTER_PORT:-${endpoint##*:}}}"
rdzv="${RDZV_BACKEND:-${PET_RDZV_BACKEND:-}}"
rdzv_id="${RDZV_ID:-${PET_RDZV_ID:-muon-dist}}"
rdzv_conf="${RDZV_CONF:-${PET_RDZV_CONF:-}}"
restarts="${MAX_RESTARTS:-${PET_MAX_RESTARTS:-}}"
: "${addr:=127.0.0.1}" "${port:=29500}"
case "$nproc" in auto | gpu) nproc="" ;; cpu) nproc=1 ;; esac
unset "${!PET_@}" # each is an option below

printf -v started ' %q' "$@"
export MUON_DIST_COMMAND="${MUON_DIST_COMMAND:-bash launch/torchrun.sh$started}" # for the message of a run that stops

while (($#)); do
    # torchrun's own spellings: --nproc-per-node=2, --nproc_per_node 2
    if [[ "$1" == --?*=* ]]; then
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
    fi
    if [[ "$1" == --?*_* ]]; then
        set -- "${1//_/-}" "${@:2}"
    fi
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        --nnodes | --node-rank | --nproc-per-node | --master-addr | --master-port | --rdzv | --rdzv-id | \
            --rdzv-conf | --max-restarts | --rdzv-backend)
            (($# >= 2)) || muon_die "$1 needs a value"
            case "$1" in
                --nnodes) nnodes="$2" ;;
                --node-rank) node_rank="$2" ;;
                --nproc-per-node) nproc="$2" ;;
                --master-addr) addr="$2" ;;
                --master-port) port="$2" ;;
                --rdzv | --rdzv-backend) rdzv="$2" ;;
                --rdzv-id) rdzv_id="$2" ;;
                --rdzv-conf) rdzv_conf="$2" ;;
                --max-restarts) restarts="$2" ;;
            esac
            shift 2
            ;;
        -m) break ;;
        -*) muon_die "unknown option $1; bash launch/torchrun.sh --help lists them" ;;
        *) break ;;
    esac
done

if (($# == 0)); then
    usage >&2
    exit 2
fi
[[ "$nnodes" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] \
    || muon_die "--nnodes (NNODES) must be a positive number or MIN:MAX, not '$nnodes'"
fewest="${nnodes%%:*}" most="${nnodes##*:}"
((fewest <= most)) || muon_die "--nnodes (NNODES): MIN is above MAX in '$nnodes'"
if [[ "$nnodes" == *:* ]]; then
    [[ "${rdzv:=c10d}" == c10d ]] || muon_die "--nnodes $nnodes is elastic, which needs --rdzv c10d, not $rdzv"
    : "${restarts:=3}"
fi
: "${rdzv:=static}" "${restarts:=0}"
[[ "$node_rank" =~ ^[0-9]+$ ]] || muon_die "--node-rank (NODE_RANK) must be a number, not '$node_rank'"
[[ "$port" =~ ^[0-9]+$ ]] || muon_die "--master-port (MASTER_PORT) must be a number, not '$port'"
[[ "$restarts" =~ ^[0-9]+$ ]] || muon_die "--max-restarts (MAX_RESTARTS) must be a number, not '$restarts'"
if [[ "$nnodes" != 1 ]]; then
    case "$rdzv" in
        static) ((node_rank < most)) || muon_die "--node-rank $node_rank must be below --nnodes $nnodes" ;;
        c10d) ;;
        *) muon_die "--rdzv (RDZV_BACKEND) must be static or c10d, not '$rdzv'" ;;
    esac
fi
# The arguments are valid. The next lines import torch, which takes seconds.
python="${VIRTUAL_ENV:-$MUON_ROOT/.venv}/bin/python"
[[ -x "$python" ]] || python="$(command -v python3)"
"$python" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") is None or i.find_spec("muon_dist") is None)' \
    || muon_die "$python has no torch or no muon_dist: activate the environment in which muon-dist is installed$(
        [[ ! -e "$MUON_ROOT/launch/quickstart.sh" ]] || printf ', or make one with launch/quickstart.sh')"
if [[ -z "$nproc" ]]; then
    # The GPUs that torch sees, as limited by CUDA_VISIBLE_DEVICES and MIG; nvidia-smi would count all cards.
    nproc="$("$python" -c 'import torch; print(torch.cuda.device_count())' | tail -n 1)"
    [[ "$nproc" =~ ^[1-9][0-9]*$ ]] || nproc=1
fi
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || muon_die "--nproc-per-node (NPROC_PER_NODE) must be a positive number, not '$nproc'"

case "$1" in
    -m | *.py) program=("$@") ;;
    *) program=(-m muon_dist.cli "$@") ;;
esac

options=(--nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "$restarts")
if [[ "$nnodes" == 1 ]]; then
    meeting="$(mktemp -d "${TMPDIR:-/tmp}/muon-dist.XXXXXXXX")" \
        || muon_die "no folder for temporary files: TMPDIR is '${TMPDIR:-/tmp}'; set it to a folder that can be written"
    trap 'rm -rf -- "$meeting"' EXIT
    options+=(--rdzv-backend c10d --rdzv-id "$rdzv_id" --rdzv-endpoint "$meeting/rendezvous"
        --rdzv-conf store_type=file --local-addr 127.0.0.1)
    # torchrun would share a TCP store that listens on every interface; muon-dist uses this file as store instead
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 MUON_DIST_STORE="$meeting/store"
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
else
    unset MUON_DIST_STORE
    case "$addr" in
        127.* | localhost | ::1)
            export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
            ;;
    esac
    if [[ "$rdzv:$node_rank" == static:0 ]]; then # this machine listens on the port; torchrun would end in a traceback
        "$python" -c 'import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("", int(sys.argv[1])))' "$port" 2>/dev/null \
            || muon_die "port $port of this machine is in use: choose a free one with --master-port, the same on all nodes"
    fi
    case "$rdzv" in
        static)
            options+=(--node-rank "$node_rank" --master-addr "$addr" --master-port "$port")
            ;;
        c10d)
            options+=(--rdzv-backend c10d --rdzv-id "$rdzv_id" --rdzv-endpoint "$addr:$port")
            # Each round gets a new store. In a shared store, the keys of rounds differ only by each node's count of
            # restarts. A node that restarts because another node failed does not count that restart, so it would
            # read the keys of the lost round.
            export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            [[ -z "$rdzv_conf" ]] || options+=(--rdzv-conf "$rdzv_conf")
            ;;
    esac
fi

# On GPUs: buckets of changing sizes then do not fragment the memory; and if two communicators of NCCL work at the same
# time (HSDP), their operations start in the order in which they were issued.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export NCCL_LAUNCH_ORDER_IMPLICIT="${NCCL_LAUNCH_ORDER_IMPLICIT:-1}"
# One thread per process by default, because torchrun's processes share the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# The first error that a process of this node reports, to repeat it below torchrun's own table of exit codes.
said="$(mktemp "${TMPDIR:-/tmp}/muon-dist.XXXXXXXX")" && rm -f -- "$said" && export MUON_DIST_FIRST_ERROR="$said"
[[ "$nnodes" == 1 ]] || muon_log "the run begins when $nnodes nodes have met at $addr:$port ($rdzv rendezvous)"
"$python" -m torch.distributed.run "${options[@]}" "${program[@]}" &
child=$!
# A signal to this script is sent to torchrun, which sends it to its processes.
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
# a signal ends `wait` early; bash remembers the status of a process that has ended
while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true
done
status=0
wait "$child" || status=$?
if ((status != 0)) && [[ -s "$said" ]]; then
    IFS= read -r -d '' first <"$said" || true
    muon_log "the first error: $first"
elif ((status != 0)) && [[ "$nnodes" != 1 ]]; then
    muon_log "torchrun ended with exit code $status; the reason is above. If the nodes did not meet: start this command" \
        "on all $nnodes nodes. Each must reach port $port of $addr."
fi
rm -f -- "$said"
exit "$status"
