"""Split a model into the files that the ranks of a run write with `--ckpt-format torch`.

Independent of the reader: each rank's part is cut as megatron-core's layers cut it, from tensors
that are named and stacked as in torch_dist.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_FILE = "model_optim_rng.pt"


def part(name, value, rank, size):
    """What one of `size` tensor-parallel ranks holds."""
    if name.endswith("linear_fc1.weight"):
        gate, up = value.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value.chunk(size, dim=1)[rank].contiguous()
    if "norm" in name or "router" in name:
        return value
    return value.chunk(size)[rank].clone()


def chunk_tensors(tensors, layers, *, first, last, tp, local):
    """A chunk of the model on one tensor-parallel rank, named as in memory."""
    rank, size = tp
    result = {}
    for name, value in tensors.items():
        head, is_layer, tail = name.partition("decoder.layers.")
        if is_layer and not head:
            tail = LOCAL_NAMES.get(tail, tail) if local else tail
            for index, layer in enumerate(layers):
                key = f"decoder.layers.{index}.{tail}"
                result[key] = part(name, value[layer], rank, size)
                result[f"{key.rpartition('.')[0]}._extra_state"] = None
        elif first if name.startswith("embedding.") else last:
            result[name] = part(name, value, rank, size)
    return result


def rank_state(chunks, args, iteration=3):
    """What a rank's file holds; the optimizer's state is much of it, as in life."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        **dict(zip(names, chunks, strict=True)),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(1000)}}},
        "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
    }


def write_legacy(save, tensors, args, *, tp=1, pp=1, vpp=1, local=False, iteration=3):
    """Write `save`, a `--save` directory, and return the folder of the iteration."""
    args = argparse.Namespace(**vars(args))
    args.tensor_model_parallel_size, args.pipeline_model_parallel_size = tp, pp
    args.virtual_pipeline_model_parallel_size = vpp if vpp > 1 else None
    directory = Path(save) / f"iter_{iteration:07d}"
    spans = torch.arange(args.num_layers).chunk(pp * vpp)
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            chunks = [
                chunk_tensors(
                    tensors,
                    spans[stage * pp + pp_rank].tolist(),
                    first=(stage, pp_rank) == (0, 0),
                    last=(stage, pp_rank) == (vpp - 1, pp - 1),
                    tp=(tp_rank, tp),
                    local=local,
                )
                for stage in range(vpp)
            ]
            folder = directory / (f"mp_rank_{tp_rank:02d}" + f"_{pp_rank:03d}" * (pp > 1))
            folder.mkdir(parents=True)
            torch.save(rank_state(chunks, args, iteration), folder / _FILE)
    (Path(save) / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return directory


def edit(folder, change):
    """Change what a rank's file holds: `change` gets the state."""
    path = Path(folder) / _FILE
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)
