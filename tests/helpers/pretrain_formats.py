"""The quickstart's script with two things that it leaves to Megatron-LM's own pretrain_gpt.py:
packed documents (--dataloader-inter-document-masking, megatron-core 0.19) and virtual pipeline
stages. Mock documents are made short, so that a sample of 128 tokens holds several.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import torch
from megatron.core import mpu, utils
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTLowLevelDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import get_args, print_rank_0

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
LONGEST_DOCUMENT = 60


def load_quickstart():
    sys.path.insert(0, str(QUICKSTART))  # for its neighbours
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART / "pretrain_gpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


quickstart = load_quickstart()


def is_packed() -> bool:
    return getattr(get_args(), "dataloader_inter_document_masking", False)


def datasets_provider(num_samples, vp_stage=None):
    """The quickstart's; with two pipeline ranks each holds the first or the last chunk."""
    if not is_packed():
        return quickstart.datasets_provider(num_samples)
    packed = functools.partial(GPTDatasetConfig, inter_document_masking=True)
    short = mock.patch.object(MockGPTLowLevelDataset, "max_sequence_length", LONGEST_DOCUMENT)
    with short, mock.patch.object(quickstart, "GPTDatasetConfig", packed):
        return quickstart.datasets_provider(num_samples)


def forward_step(data_iterator, model):
    """One forward pass; all samples of a micro-batch become one pack."""
    if not is_packed():
        return quickstart.forward_step(data_iterator, model)
    batch = utils.flatten_batch_for_packed_sequences({**next(data_iterator)})
    batch = utils.get_batch_on_this_cp_rank(
        {**batch, "cu_seqlens_padded": None},
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=True,
    )
    borders = batch["cu_seqlens"][0]
    longest = int(batch["max_seqlen"].item())
    assert longest == borders.diff().max()
    print_rank_0(f"> a pack of {len(borders) - 1} documents, the longest of {longest} tokens")
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    mask = batch["loss_mask"]
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=mask,
        packed_seq_params=packed,
    )
    return losses, functools.partial(quickstart.loss_func, mask.to(torch.float))


# Megatron's checkpoint writer starts workers that import this file again: keep the guard.
if __name__ == "__main__":
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, arguments, pretrain

    datasets_provider.is_distributed = True
    if hasattr(argument_utils, "gpt_config_from_args"):
        args = arguments.parse_and_validate_args()
        config = argument_utils.gpt_config_from_args(args)
        pretrain(
            argument_utils.pretrain_cfg_container_from_args(args, config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            get_embedding_ranks=quickstart.embedding_ranks,
        )
    else:  # megatron-core 0.17 and 0.18
        import older_megatron

        older_megatron.pretrain(datasets_provider, forward_step, quickstart.embedding_ranks)
