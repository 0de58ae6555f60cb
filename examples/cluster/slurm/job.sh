# shellcheck shell=bash
# Sourced by stage.sbatch: run a command on the nodes of the job, and requeue the job until the
# command has really ended.
#
# SIGUSR1 (from Slurm, before the time limit): stop, saving what can be saved, and requeue.
# SIGTERM (scancel, preemption): stop likewise, but leave it to Slurm whether the job comes back.

MAX_REQUEUES=${MAX_REQUEUES:-20}                   # restarts of the job, those by Slurm included
STOP_TIMEOUT=${STOP_TIMEOUT:-1770}                 # seconds after SIGUSR1; then the job is requeued as it is
RDZV_PORT=${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # port of the first node where agents meet

# shellcheck source=examples/cluster/common.sh
source "$LONGROPE_CLUSTER/common.sh"

# run_job NODES COMMAND ...: once on each of so many nodes; ends the batch script.
run_job() {
  local nodes=$1 host status
  shift
  restarts=${SLURM_RESTART_COUNT:-0} asked='' step='' timer=''
  trap finish EXIT
  trap 'ask USR1' USR1
  trap 'ask TERM' TERM
  trap requeue USR2
  host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  [[ $host ]] || die "scontrol names no host of SLURM_JOB_NODELIST ${SLURM_JOB_NODELIST:-}"
  export NNODES=$nodes RDZV_ENDPOINT=$host:$RDZV_PORT RDZV_ID=$SLURM_JOB_ID-$restarts
  # srun does not take it from sbatch by itself.
  [[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  say "job $SLURM_JOB_ID, restart $restarts of at most $MAX_REQUEUES, on $SLURM_JOB_NODELIST"
  # When one agent has gone for good, the others wait for it no longer than so.
  srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --wait 600 "$@" &
  step=$!
  [[ $asked ]] && kill -USR1 "$step" # a signal that was faster
  wait_for "$step"
  status=$?
  [[ $asked == TERM ]] && exit 143
  ((status == 0)) && exit 0
  if [[ $asked ]] || ((status == GOES_ON)); then requeue; fi
  exit "$status"
}

# shellcheck disable=SC2329  # these are invoked by traps
ask() {
  interrupted=yes
  say "SIG$1: stopping job $SLURM_JOB_ID"
  if [[ ! $asked ]]; then
    # srun hands SIGUSR1 to the node scripts; SIGTERM would end srun itself.
    [[ $step ]] && kill -USR1 "$step"
    if [[ $1 == USR1 ]]; then
      { sleep "$STOP_TIMEOUT" && kill -USR2 $$; } >/dev/null 2>&1 &
      timer=$!
    fi
  fi
  [[ $asked == TERM ]] || asked=$1
}

requeue() {
  if [[ $asked == TERM ]]; then # the time that SIGUSR1 left is over, but Slurm has the last word
    interrupted=yes
    return
  fi
  if ((restarts >= MAX_REQUEUES)); then
    say "restarted $restarts times, MAX_REQUEUES; submit the job again to go on"
    exit "$GOES_ON"
  fi
  trap '' USR1 TERM USR2 # requeueing ends this script
  say "requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  say "Slurm refused; submit the job again to go on"
  exit "$GOES_ON"
}

# shellcheck disable=SC2329
finish() {
  [[ $timer ]] && pkill -P "$timer" # its sleep, or that would go on
}
