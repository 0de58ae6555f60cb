#!/usr/bin/env bash
# One node's part of a job. Run it on every node, with the same variables.
#
#   agent.sh -m megatron_longrope COMMAND ...    NPROC_PER_NODE processes under a torchrun agent
#   agent.sh PROGRAM ...                         one process, as it is
#
# SIGTERM, SIGINT and SIGUSR1 stop the work in good order: training that has --exit-signal-handler
# saves a checkpoint first. The exit status is then 75: the same command goes on.

PYTHON=${PYTHON:-python}                # interpreter that has megatron_longrope
NNODES=${NNODES:-1}                     # nodes; each runs this script once
NPROC_PER_NODE=${NPROC_PER_NODE:-8}     # processes on this node, one per GPU
RDZV_ENDPOINT=${RDZV_ENDPOINT:-}        # HOST:PORT where agents meet, HOST one of the nodes; needed for several
RDZV_ID=${RDZV_ID:-longrope}            # name of the job, the same on every node
RDZV_CONF=${RDZV_CONF:-}                # for torchrun --rdzv-conf, such as join_timeout=1800,is_host=1
LOCAL_ADDR=${LOCAL_ADDR:-}              # this node's address for the others (default: its host name)
MAX_RESTARTS=${MAX_RESTARTS:-3}         # how often the workers start anew after a failure
STOP_REPEAT=${STOP_REPEAT:-10}          # seconds; workers that still start miss the first signal
LONGROPE_DEVICE=${LONGROPE_DEVICE:-gpu} # cpu: no GPU is looked for

# shellcheck source=examples/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

[[ $# -gt 0 ]] || die "no command; give -m megatron_longrope COMMAND ... or a program"
launch=()
if [[ $1 == -m ]]; then
  ((NNODES == 1)) || need RDZV_ENDPOINT "HOST:PORT of one of the $NNODES nodes, the same on all of them"
  if [[ $LONGROPE_DEVICE == gpu ]]; then
    # Better here than in the middle of a rendezvous that waits for this node.
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
    ((gpus >= NPROC_PER_NODE)) ||
      die "$(hostname) has $gpus GPUs and NPROC_PER_NODE is $NPROC_PER_NODE; lower it, take the node out, or set LONGROPE_DEVICE=cpu"
  fi
  launch=(
    "$PYTHON" -m torch.distributed.run
    --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS"
    --rdzv-backend c10d # unlike static, forms anew when an agent is lost
    --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:0}" --rdzv-id "$RDZV_ID"
    ${RDZV_CONF:+--rdzv-conf "$RDZV_CONF"} ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"}
  )
fi

# The signal at which Megatron saves and ends; none if it was not asked to.
handler='' exit_signal=SIGTERM words=("$@")
for i in "${!words[@]}"; do
  case ${words[i]} in
    --exit-signal-handler) handler=yes ;;
    --exit-signal) exit_signal=${words[i + 1]:-} ;;
  esac
done

# Agents keep the address of the store on rank 0 from one rendezvous to the next, also when that
# node has been replaced; without a shared store they ask anew.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# With tensor parallelism before Blackwell, kernels must start in the order in which they were
# queued, for communication to overlap with computation; Megatron asks for it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A collective that fails ends its process, so that torchrun sees it (the default; set to be sure).
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Threads of a process; torchrun would set 1 and say so at length.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# shellcheck disable=SC2329  # invoked by the trap
tell_workers() {
  # torchrun would give its workers 30 s, less than a checkpoint takes: the signal goes past it.
  if [[ ${launch[*]} && $handler ]] && pkill "-${exit_signal#SIG}" -P "$child"; then return; fi
  kill -TERM "$child" 2>/dev/null
}

# shellcheck disable=SC2329
stop() {
  interrupted=yes
  [[ $stopping ]] && return
  stopping=yes
  say "asked to stop on $(hostname)"
  tell_workers
  while sleep "$STOP_REPEAT"; do tell_workers; done >/dev/null 2>&1 &
  repeats=$!
}

say "$(hostname): ${launch[*]:+node of $NNODES, rendezvous ${RDZV_ENDPOINT:-here}, at most $MAX_RESTARTS restarts: }$*"
stopping='' repeats=''
trap '' USR1 # what starts now ignores it until Megatron has its handler
set -m       # a process group of its own: Ctrl-C in a terminal comes here alone
"${launch[@]}" "$@" &
child=$!
set +m
trap stop TERM INT USR1
wait_for "$child"
status=$?
[[ $repeats ]] && kill "$repeats"
if [[ $stopping ]]; then
  say "stopped; the same command goes on"
  exit "$GOES_ON"
fi
((status == 0)) || say "failed with exit status $status on $(hostname)"
exit "$status"
