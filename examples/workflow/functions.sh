# shellcheck shell=bash
# Read by the bash that runs a rule's commands (see `shell` beside this file).

unset BASH_ENV # not for the scripts that it starts
WORKFLOW=$(dirname "${BASH_SOURCE[0]}")
PATH=$LONGROPE_BIN:$PATH # the environment of Snakemake comes first

# The commands of the recipes end with SIGTERM when this shell is gone, whatever ended it.
BOUND=(setpriv --pdeathsig TERM --)
command -v setpriv >/dev/null || BOUND=()
longrope() { "${BOUND[@]}" longrope "$@"; }
python() { "${BOUND[@]}" python "$@"; }
torchrun() { "${BOUND[@]}" torchrun "$@"; }

# log_to FILE [FLAGS OF GREP]: from here on all output is appended to FILE; what grep lets through is
# shown, and the last lines of a rule that fails.
log_to() {
  LOG=$1
  shift
  (($#)) || set -- -e ''
  # Snakemake deletes a rule's log before it runs the rule again. Under its second name what the earlier
  # attempt wrote stays, and gets its first one back.
  local kept=.logs/${LOG//\//:}
  mkdir -p .logs "$(dirname "$LOG")"
  [[ -e $kept ]] || { touch "$LOG" && ln "$LOG" "$kept"; }
  [[ $LOG -ef $kept ]] || ln -f "$kept" "$LOG"
  exec {SCREEN}>&2
  trap 'status=$?; ((status == 0)) || { sleep 0.2; echo "the end of $LOG:"; tail -n 12 "$LOG"; } >&$SCREEN; exit $status' EXIT
  # No pipeline around the commands: they must stay children of this shell.
  exec > >(tee -a "$LOG" | { grep --line-buffered "$@" || true; }) 2>&1
  echo "started at $(date +%FT%T)" >>"$LOG"
}

# begin WORK WORD ...: go on with what an interrupted run left in WORK (and WORK.*) if that was begun
# with the same words; otherwise put it into stale/. A word that is a file counts with its content.
begin() {
  local work=$1 known word aside='' item identity lock
  known=.begun/${work//\//:}
  shift
  mkdir -p .begun "$(dirname "$work")"
  # Held by this shell and all that it starts: the orphan of a killed run keeps others out.
  exec {lock}<>"$known"
  flock --timeout 120 "$lock" || {
    echo "$work is still being written by an earlier run; see fuser $PWD/$known" >&2
    exit 1
  }
  identity=$(for word; do identify "$word"; done)
  if [[ $identity != "$(<"$known")" ]]; then
    for item in "$work" "$work".*; do
      [[ -e $item ]] || continue
      aside=${aside:-stale/$(date +%F_%H-%M-%S.%N)}
      mkdir -p "$aside/$(dirname "$item")"
      mv -T "$item" "$aside/$item"
      echo "$item was begun with other flags or inputs; it is in $aside now" >&2
    done
    printf '%s\n' "$identity" >"$known"
  fi
}

# A word, and of a file what tells that it changed: its hash, or size and time if it is large.
identify() {
  if [[ -f $1 ]] && (($(stat -Lc %s "$1") < 1000000)); then
    sha256sum <"$1"
  elif [[ -e $1 ]]; then
    stat -Lc '%s %Y' "$1"
  fi
  echo "$1"
}

# trained FOLDER STEPS: whether iteration STEPS is saved there.
trained() {
  local tracker=$1/latest_checkpointed_iteration.txt
  [[ -f $tracker && $(<"$tracker") == "$2" ]]
}

# done_at FOLDER STEPS: say so if a training stopped before its end, at a time limit for example.
done_at() {
  trained "$@" && return
  echo "$1 stopped before iteration $2; the next run goes on from its last checkpoint" >&2
  return 75
}

# stamp FILE: what a rule writes that has no other output. Never the same twice: Snakemake takes an
# input of the same content as unchanged.
stamp() { date +%FT%T.%N >"$1"; }

# stop_at NOW LIMIT: when a job is to save what it has, in seconds as they are given. One that is shorter
# than twice STOP_SECONDS works for half of its time.
stop_at() {
  local lead=${STOP_SECONDS:-1800} half=$((($2 - $1) / 2))
  echo $(($2 - (lead < half ? lead : half)))
}

# on_gpus N longrope COMMAND ...: on N GPUs of this machine, or of each node of this Slurm job; without
# GPUs one process.
on_gpus() {
  local gpus=$1 nodes=1 step=() own job hosts limit=''
  shift 2
  if ((gpus)) && [[ ${SLURM_JOB_ID:-} ]]; then
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    nodes=$(sed -n 's/.* NumNodes=\([0-9]*\).*/\1/p' <<<"$job")
  fi
  ((nodes >= ${LONGROPE_NODES:-1})) || {
    echo "the settings ask for $LONGROPE_NODES nodes and this command has $nodes; set nodes=$nodes, or run the recipe with" \
      "--profile examples/profiles/slurm, which asks Slurm for them" >&2
    exit 2
  }
  if ((gpus == 0)); then
    longrope "$@"
    return
  fi
  if [[ ${SLURM_JOB_ID:-} ]]; then
    limit=$(sed -n 's/.* EndTime=\([0-9T:-]*\).*/\1/p' <<<"$job")
    hosts=$(sed -n 's/.* NodeList=\([^ ]*\).*/\1/p' <<<"$job")
    : "${RDZV_ENDPOINT:=$(scontrol show hostnames "$hosts" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))}"
    # A step beside Snakemake's own, whose variables would confine it to the first node. When one agent
    # has gone for good, the others wait no longer than so.
    mapfile -t own < <(compgen -e | grep '^SLURM_' | grep -v '^SLURM_CONF$')
    step=(env "${own[@]/#/--unset=}" srun --jobid "$SLURM_JOB_ID" --overlap
      --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --wait 600)
    export RDZV_ENDPOINT RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  fi
  NNODES=$nodes NPROC_PER_NODE=$gpus OMP_NUM_THREADS=1 PYTHON=$LONGROPE_BIN/python \
    "${BOUND[@]}" "${step[@]}" "$WORKFLOW/../cluster/torchrun/agent.sh" -m megatron_longrope "$@" &
  local work=$!
  if [[ $limit ]]; then # before it: save a checkpoint and end, to be submitted again
    limit=$(stop_at "$(date +%s)" "$(date -d "$limit" +%s)")
    while sleep 10 && kill -0 "$work" 2>/dev/null; do
      (($(date +%s) < limit)) || { kill -USR1 "$work"; break; }
    done &
  fi
  wait "$work"
}

# Megatron prints hundreds of lines; these are the ones to watch. NOISE is what libraries announce.
TRAINING='lm loss|^> (longrope|cpu)|longrope: error|successfully (saved|loaded)|Error'
NOISE='[Ww]arning|warnings\.warn|CUDA_HOME|GPTModel IS DEPRECATED|it/s|^\s*$'

# logged FILE: wait until the log has all that was printed so far.
logged() {
  local mark="end of $BASHPID"
  echo "$mark"
  until grep -q "^$mark" "$1"; do sleep 0.1; done
}
