"""The quickstart's script with virtual pipeline stages, which it leaves to Megatron-LM's own
pretrain_gpt.py. Mock documents of packed runs are made short, so that a sample of 128 tokens holds
several, and the packs are told.
"""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
from megatron.training import print_rank_0

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
LONGEST_DOCUMENT = 60


def load_quickstart():
    sys.path.insert(0, str(QUICKSTART))  # for its neighbours
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART / "pretrain_gpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


quickstart = load_quickstart()


def datasets_provider(num_samples, vp_stage=None):
    """The quickstart's; with two pipeline ranks each holds the first or the last chunk."""
    if not quickstart.packs_documents():
        return quickstart.datasets_provider(num_samples)
    with mock.patch.object(MockGPTLowLevelDataset, "max_sequence_length", LONGEST_DOCUMENT):
        return quickstart.datasets_provider(num_samples)


def forward_step(data_iterator, model):
    """The quickstart's, which says what it packs."""

    def get_pack(sample):
        batch = packed(sample)
        borders = batch["packed_seq_params"].cu_seqlens_q
        longest = int(borders.diff().max())
        assert batch["packed_seq_params"].max_seqlen_q == longest
        print_rank_0(f"> a pack of {len(borders) - 1} documents, the longest of {longest} tokens")
        return batch

    packed = quickstart.get_pack
    with mock.patch.object(quickstart, "get_pack", get_pack):
        return quickstart.forward_step(data_iterator, model)


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
