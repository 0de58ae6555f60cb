"""Write checkpoints as Megatron-FSDP lays them out, with torch alone, on two gloo ranks.

Run as `python make_fsdp_checkpoint.py DIRECTORY` with the model's tensors, named and stacked as in
torch_dist, and the arguments in DIRECTORY/wanted.pt. Synthetic, since Megatron-FSDP needs CUDA and
einops; where einops is installed, test_formats_of_megatron.py has it write one on the CPU. Names,
the split of linear_fc1 and what lies beside the tensors follow megatron/training/checkpointing.py
and megatron/core/transformer/fsdp_dtensor_checkpoint.py of 0.19.
"""

import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

RANKS = 2
# What state_dict() of each wrapper adds: Megatron-FSDP's name the model `module`.
VARIANTS = {"fsdp_dtensor": ("module.", True), "torch_dcp": ("", False)}
_STACKED = re.compile(r"(decoder\.layers\.)(.+)")


def per_layer(tensors):
    for name, value in tensors.items():
        match = _STACKED.fullmatch(name)
        if match is None:
            yield name, value
            continue
        for layer, item in enumerate(value):
            yield f"{match[1]}{layer}.{match[2]}", item


def state_dict(tensors, args, prefix, splits_fc1, mesh):
    def sharded(value):
        return distribute_tensor(value.contiguous(), mesh, [Shard(0)])

    model = {}
    for name, value in per_layer(tensors):
        if splits_fc1 and name.endswith("linear_fc1.weight"):
            gate, up = value.chunk(2)
            model[f"{prefix}{name}_w"] = sharded(gate)
            model[f"{prefix}{name}_v"] = sharded(up)
        else:
            model[prefix + name] = sharded(value)
    state = {name: {"exp_avg": sharded(value.full_tensor())} for name, value in model.items()}
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 3,
        "model": model,
        "optimizer": {"state": state, "param_groups": [{"lr": 1e-3}]},
        "rng_state": {"(0, 0)": [{"torch_rng_state": torch.get_rng_state()}]},
        "num_floating_point_operations_so_far": 1.0,
    }


def write(rank, directory):
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.FileStore(str(directory / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    wanted = torch.load(directory / "wanted.pt", weights_only=False)
    for variant, layout in VARIANTS.items():
        save = directory / variant
        state = state_dict(wanted["tensors"], wanted["args"], *layout, mesh)
        dcp.save(state, checkpoint_id=save / "iter_0000003")
        if rank == 0:
            (save / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Nothing has started a thread yet, and torch need not be imported twice more.
    arguments = (Path(sys.argv[1]),)
    multiprocessing.start_processes(write, arguments, nprocs=RANKS, start_method="fork")
