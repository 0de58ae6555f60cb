#!/usr/bin/env bash
# Fine-tune at a long window on several nodes. Run it on every node, with the same variables:
#
#   BASE=checkpoints/base SAVE=checkpoints/128k DATA=data/train_128k FACTORS=factors/128k.json \
#       TOKENIZER=hf_model SCRIPT=Megatron-LM/pretrain_gpt.py \
#       NNODES=2 RDZV_ENDPOINT=node1:29400 examples/cluster/torchrun/finetune.sh
#
# Defaults: LLaMA2-7B and the LongRoPE paper's first stage, on 2 nodes of 8 GPUs.
# Exit status: 0 when iteration TRAIN_ITERS is saved, 75 when it stopped before that in good order;
# the same command then goes on from the last checkpoint. Nodes and processes: see agent.sh.

BASE=${BASE:-}                       # needed: Megatron checkpoint to start from
SAVE=${SAVE:-}                       # needed: folder of the run's checkpoints, which all nodes share
DATA=${DATA:-}                       # needed: prefix of the training set (longrope data prepare)
FACTORS=${FACTORS:-}                 # needed: factor file of the search
TOKENIZER=${TOKENIZER:-}             # needed: Hugging Face folder that has the tokenizer
SCRIPT=${SCRIPT:-pretrain_gpt.py}    # Megatron-LM's pretrain script, or any like it
SEQ_LENGTH=${SEQ_LENGTH:-131072}     # tokens of a sample; the paper: 131072, then 262144
TRAIN_ITERS=${TRAIN_ITERS:-400}      # the paper: 400 at 128k, then 600 at 256k
GLOBAL_BATCH=${GLOBAL_BATCH:-32}     # samples of an iteration (the paper's 32)
LEARNING_RATE=${LEARNING_RATE:-2e-5} # falls linearly to 0 (the paper's)
WARMUP=${WARMUP:-20}                 # iterations (the released launch scripts')
SAVE_INTERVAL=${SAVE_INTERVAL:-50}   # iterations; what a lost node can cost
TP=${TP:-4}                          # tensor parallel size, within a node
CP=${CP:-4}                          # context parallel size
EXTRA_ARGS=${EXTRA_ARGS:-}           # more Megatron flags, on any number of lines; they win over those below
LONGROPE_DEVICE=${LONGROPE_DEVICE:-gpu} # cpu: train on the CPU (gloo, fp32); for trying the scripts out

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/cluster/common.sh
source "$here/../common.sh"
need BASE "the Megatron checkpoint to start from"
need SAVE "the folder of the run's checkpoints"
need DATA "the prefix of the training set"
need FACTORS "the factor file of a search"
need TOKENIZER "a Hugging Face folder that has the tokenizer"

extra=()
read -r -d '' -a words <<<"$EXTRA_ARGS" # no delimiter: all lines
for word in "${words[@]}"; do
  case ${word%%=*} in
    \\) ;; # ends a line that was pasted
    # Whether the work is done is judged by the variables: a job would be requeued for nothing.
    --train-iters | --train-samples) die "EXTRA_ARGS has ${word%%=*}; set TRAIN_ITERS instead" ;;
    --save) die "EXTRA_ARGS has --save; set SAVE instead" ;;
    --load) die "EXTRA_ARGS has --load; leave it out: the run starts from BASE and goes on from SAVE" ;;
    *) extra+=("$word") ;;
  esac
done

model=( # LLaMA2-7B; longrope convert from-hf prints these flags for any model
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
  --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
  --make-vocab-size-divisible-by 64 # 32000 rows: nothing is padded up to TP 4
  --position-embedding-type rope # stays rope: the plugin replaces the module behind it
  --rotary-base 10000
  --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
  --longrope-config "$FACTORS"
)
parallel=(
  --tensor-model-parallel-size "$TP"
  --sequence-parallel # norms and dropout are split over TP too: their activations shrink by TP
  --context-parallel-size "$CP"
  # K and V go round the ring of CP ranks, each step behind the attention of the step before: hidden
  # at these lengths. a2a needs fewer messages, but no more CP ranks than KV heads / TP.
  --cp-comm-type p2p
  # Optimizer state and fp32 weights are split over all DP x CP ranks.
  --use-distributed-optimizer
  --overlap-grad-reduce --overlap-param-gather # behind the backward and the forward pass
  # After so many minutes without an answer a collective fails, and torchrun starts the workers anew.
  # Longer than the slowest checkpoint; it is also what a hung node costs.
  --distributed-timeout-minutes 30
)
memory=(
  --bf16
  --micro-batch-size 1
  # MLPs again in the backward pass: 39 GiB a GPU at 128k and 55 at 256k (`longrope plan`). Whole
  # layers (--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) take 27
  # and 32 GiB, for 30 % more time: for 256k on 8 GPUs.
  --recompute-granularity selective --recompute-modules mlp
  # The default mask has sequence x sequence entries for every sample; attention is causal without.
  --no-create-attention-mask-in-dataloader
  --longrope-chunked-loss # no [sequence, vocabulary] logits, forward or backward
)
training=(
  --data-path "$DATA" --split '1000,0,0'
  --train-iters "$TRAIN_ITERS" --global-batch-size "$GLOBAL_BATCH"
  --lr "$LEARNING_RATE" --min-lr 0 --lr-decay-style linear --lr-warmup-iters "$WARMUP"
  --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.999 --clip-grad 1.0
  # The mean over tokens of the whole batch. Without it every micro-batch and every CP rank counts
  # the same, however many of its tokens the loss mask leaves.
  --calculate-per-token-loss
  --log-interval 1 --eval-iters 0 --eval-interval 1000
)
checkpoints=(
  # The first start finds nothing in SAVE and takes the weights of BASE, without its optimizer state;
  # every later one goes on from SAVE.
  --pretrained-checkpoint "$BASE" --load "$SAVE" --save "$SAVE" --save-interval "$SAVE_INTERVAL"
  # Save after the iteration in which the signal comes, and end. Not the default SIGTERM: that is
  # how torchrun ends workers that wait for a lost node and would never come to saving.
  --exit-signal-handler --exit-signal SIGUSR1
)
device=()
[[ $LONGROPE_DEVICE == cpu ]] && device=(--cpu)

# Iteration of the last checkpoint.
saved() {
  local tracker=$SAVE/latest_checkpointed_iteration.txt iteration=0
  [[ -f $tracker ]] && iteration=$(<"$tracker")
  echo "$iteration"
}

if (($(saved) >= TRAIN_ITERS)); then
  say "nothing to do: $SAVE has iteration $(saved) of $TRAIN_ITERS"
  exit 0
fi
[[ -f $BASE/latest_checkpointed_iteration.txt ]] ||
  die "BASE $BASE has no latest_checkpointed_iteration.txt; it must be the --save folder of a Megatron run"
[[ -f $SCRIPT ]] || die "SCRIPT $SCRIPT does not exist; give the path of Megatron-LM's pretrain_gpt.py"
[[ -f $DATA.idx ]] || die "DATA $DATA has no .idx; it must be the prefix of a set that longrope data prepare wrote"
mkdir -p "$SAVE"
# Megatron's index of the samples, which it finds by the set's path: one for each list of documents.
training+=(--data-cache-path "$SAVE/cache/$(cksum <"$DATA.idx" | tr ' ' -)")

trap 'kill -TERM "$agent" 2>/dev/null; interrupted=yes' TERM INT USR1
"$here/agent.sh" -m megatron_longrope pretrain "$SCRIPT" "${device[@]}" \
  "${model[@]}" "${parallel[@]}" "${memory[@]}" "${training[@]}" "${checkpoints[@]}" "${extra[@]}" &
agent=$!
wait_for "$agent"
status=$?
((status == 0 || status == GOES_ON)) || exit "$status"
if (($(saved) >= TRAIN_ITERS)); then exit 0; fi
say "stopped at iteration $(saved) of $TRAIN_ITERS; the same command goes on"
exit "$GOES_ON"
