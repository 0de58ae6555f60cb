#!/usr/bin/env bash
# Search rescale factors on several nodes. Run it on every node, with the same variables:
#
#   LOAD=checkpoints/base DATA=data/search OUTPUT=factors/128k.json TARGET_LENGTH=128k \
#       NNODES=2 RDZV_ENDPOINT=node1:29400 examples/cluster/torchrun/search.sh
#
# Each TP x CP processes hold one model and score candidates. Every result is in OUTPUT's journal at
# once: whatever ends the job, the same command goes on. Nodes and processes: see agent.sh.

LOAD=${LOAD:-}                   # needed: Megatron checkpoint, on a file system that all nodes share
DATA=${DATA:-}                   # needed: prefix of the search documents (longrope data prepare)
OUTPUT=${OUTPUT:-}               # needed: factor file to write, shared too, for rank 0 may move
TARGET_LENGTH=${TARGET_LENGTH:-} # needed: window in tokens, such as 128k
HELD_OUT=${HELD_OUT:-}           # prefix of other documents, to compare the winner on at the end
TP=${TP:-1}                      # tensor parallel size: only for a model that does not fit one GPU
CP=${CP:-1}                      # context parallel size: only for a window that does not fit one GPU
EXTRA_ARGS=${EXTRA_ARGS:-}       # more flags of longrope search, separated by blanks

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/cluster/common.sh
source "$here/../common.sh"
need LOAD "a Megatron checkpoint"
need DATA "the prefix of prepared search documents"
need OUTPUT "the factor file to write"
need TARGET_LENGTH "the window to search for, such as 128k"
mkdir -p "$(dirname "$OUTPUT")"

read -ra extra <<<"$EXTRA_ARGS"
exec "$here/agent.sh" -m megatron_longrope search \
  --load "$LOAD" --data "$DATA" --target-length "$TARGET_LENGTH" --output "$OUTPUT" \
  ${HELD_OUT:+--held-out "$HELD_OUT"} \
  --tensor-model-parallel-size "$TP" --context-parallel-size "$CP" \
  --resume "${extra[@]}" # the journal, if there is one: after a restart and in the next job
