"""`pretrain_formats.py` with Megatron-FSDP on the CPU, as far as writing a checkpoint needs it.

Meshes that ask for CUDA are of the CPU, and gradients are summed and not averaged, since gloo
cannot scale: train with a learning rate of 0. In fp32 no Float16Module wraps the model, which
upstream's split of linear_fc1 counts on.
"""

import os
import runpy
from pathlib import Path

import torch
from torch.distributed import device_mesh

SCRIPT = Path(__file__).with_name("pretrain_formats.py")


def on_cpu(function):
    def call(first, device_type, *args, **kwargs):
        return function(first, "cpu", *args, **kwargs)

    return call


def prepare():
    mesh = device_mesh.DeviceMesh
    mesh.__init__ = on_cpu(mesh.__init__)
    mesh.from_group = staticmethod(on_cpu(mesh.from_group))
    torch.distributed._make_nccl_premul_sum = lambda factor: torch.distributed.ReduceOp.SUM

    from megatron.training import checkpointing

    split = checkpointing.handle_swiglu_in_state_dict

    def split_without_float16_module(model, *states):
        find = model.get_parameter
        model.get_parameter = lambda name: find(name.removeprefix("module."))
        try:
            return split(model, *states)
        finally:
            model.get_parameter = find

    checkpointing.handle_swiglu_in_state_dict = split_without_float16_module


# Megatron's checkpoint writer starts workers that import this file again: keep the guard.
if __name__ == "__main__":
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"  # the host's 1 is refused with Megatron-FSDP
    prepare()
    runpy.run_path(str(SCRIPT), run_name="__main__")
