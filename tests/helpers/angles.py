"""How far apart two tables of angles are."""

import math

import torch


def distance_on_the_circle(ours: torch.Tensor, theirs: object) -> float:
    """Largest difference of two tensors or arrays of angles, modulo 2 pi."""
    difference = ours.double() - torch.as_tensor(theirs).double()
    return (difference - torch.round(difference / math.tau) * math.tau).abs().max().item()
