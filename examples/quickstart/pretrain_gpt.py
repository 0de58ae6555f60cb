"""Pre-train or fine-tune a GPT model with Megatron's own training loop.

The megatron-core wheel ships the loop (`megatron.training`) but no script, so this is the
quickstart's: causal language modelling on fixed-length samples, or on packed documents that do not
see each other (--dataloader-inter-document-masking, megatron-core 0.19). With a Megatron-LM
checkout use its pretrain_gpt.py instead; the flags are the same. There is no LongRoPE in here: the
plugin comes from outside.

    longrope pretrain examples/quickstart/pretrain_gpt.py --cpu --mock-data ...
    torchrun --nproc-per-node 2 -m megatron_longrope pretrain examples/quickstart/pretrain_gpt.py \
        --cpu --context-parallel-size 2 --longrope-config factors.json ...
"""

import inspect
from functools import partial

import torch
from megatron.core import mpu, utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import (
    argument_utils,
    arguments,
    get_args,
    get_timers,
    pretrain,
    print_rank_0,
)
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def packs_documents():
    """Whether samples are packs of documents that are masked from each other."""
    return getattr(get_args(), "dataloader_inter_document_masking", False)


def reads_data():
    """Whether this pipeline stage needs samples; attention needs a pack's borders everywhere."""
    return packs_documents() or is_first_or_last_pipeline_stage(None)


def get_batch(data_iterator):
    """Next micro-batch of this rank: its zigzag part of the samples.

    The ranks of one model-parallel group read the same samples, each for itself.
    """
    if not reads_data():
        return dict.fromkeys(BATCH_KEYS)
    sample = next(data_iterator)
    if packs_documents():
        return get_pack(sample)
    batch = {
        key: sample[key].cuda(non_blocking=True) if sample.get(key) is not None else None
        for key in BATCH_KEYS
    }
    options = {"cp_group": mpu.get_context_parallel_group()}
    if "is_hybrid_cp" in inspect.signature(utils.get_batch_on_this_cp_rank).parameters:
        options["is_hybrid_cp"] = False  # asked for from megatron-core 0.18 on
    return utils.get_batch_on_this_cp_rank(batch, **options)


def get_pack(sample):
    """All samples of a micro-batch as one pack; each document is divided over ranks by itself."""
    sample = {
        key: value.cuda(non_blocking=True) if torch.is_tensor(value) else value
        for key, value in sample.items()
    }
    batch = utils.get_batch_on_this_cp_rank(
        {**utils.flatten_batch_for_packed_sequences(sample), "cu_seqlens_padded": None},
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=True,
    )
    borders, longest = batch["cu_seqlens"][0], int(batch["max_seqlen"].item())
    pack = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return {**batch, "attention_mask": None, "packed_seq_params": pack}


def loss_func(loss_mask, losses):
    """Sum of token losses and their number; Megatron averages over micro-batches and ranks."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator, model):
    """One forward pass; the loss function is applied by the schedule."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=batch.get("packed_seq_params"),
    )
    return losses, partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples):
    """Train, validation and test sets of fixed-length samples."""
    args = get_args()
    if getattr(args, "sft", False):
        raise SystemExit("--sft is not for this script; use Megatron-LM's pretrain_gpt.py")
    # Only megatron-core 0.19 has the flag and the field.
    masking = {"inter_document_masking": True} if packs_documents() else {}
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        **masking,
    )
    print_rank_0("> building datasets ...")
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        reads_data,
        config,
    ).build()


def embedding_ranks(pp_ranks):
    """Pipeline ranks that hold a word embedding: the first, and the last when it is shared."""
    first, last = pp_ranks[0], pp_ranks[-1]
    untied = get_args().untie_embeddings_and_output_weights
    return [first] if untied or first == last else [first, last]


# Megatron's checkpoint writer starts workers that import this file again: keep the guard.
if __name__ == "__main__":
    datasets_provider.is_distributed = True
    if hasattr(argument_utils, "gpt_config_from_args"):
        args = arguments.parse_and_validate_args()
        model_config = argument_utils.gpt_config_from_args(args)
        pretrain(
            argument_utils.pretrain_cfg_container_from_args(args, model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            get_embedding_ranks=embedding_ranks,
        )
    else:  # megatron-core 0.17 and 0.18
        import older_megatron

        older_megatron.pretrain(datasets_provider, forward_step, embedding_ranks)
