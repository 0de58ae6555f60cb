"""Where the tensors of a model's layers are, whichever of Megatron's model classes they belong to.

A layer of GPTModel is attention followed by an MLP; a checkpoint holds each tensor once, stacked
over the layers. A layer of HybridModel is attention (`*`) or an MLP (`-`), and a checkpoint numbers
them. A mixture of experts counts as an MLP. Both are addressed here as GPTModel's checkpoint names
them: by a name without layer number and by which attention, or which MLP, of the model it is. So
`*-*-` and two layers of GPTModel are the same model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
"""A tensor of a layer that has a number: the number, and the rest of the name."""
_STACKED = re.compile(r"decoder\.layers\.(?!\d)")
# In memory, layers without Transformer Engine keep their norms outside of the linear layers. Before
# a router, Transformer Engine does so too, also on disk.
_LOCAL_TO_DISK = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
# The experts of a layer are one tensor on disk, and modules of their own in memory.
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")
_EXPERTS_IN_MEMORY, _EXPERTS = "mlp.experts.local_experts.{expert}.", "mlp.experts.experts."
_HYBRID_FINAL_NORM, _FINAL_NORM = "decoder.final_norm.", "decoder.final_layernorm."
_PARTS = {"self_attention.": "*", "mlp.": "-"}

# A name as in a checkpoint of GPTModel, and which attention or MLP; None outside of the layers.
Address = tuple[str, int | None]


class _Sized(Protocol):
    """What is needed of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class TensorLayout:
    """Addresses of tensors, and where each of them is."""

    pattern: str
    """Attention (`*`) and MLPs (`-`) in the order in which the model runs them."""
    places: Mapping[Address, Address]
    """Address -> the tensor's name and, if it is stacked over layers, the index there."""

    @classmethod
    def of_model(cls, names: Iterable[str]) -> TensorLayout:
        """Layout of a model in memory.

        Args:
            names (Iterable[str]): Its parameters, of any spec, possibly wrapped (`module.`). The
                experts of a layer have one place, with `{expert}` in its name.
        """
        grouped = (_EXPERT.sub("{expert}", name) for name in names)
        return _numbered({name: disk_name(name) for name in grouped})

    @classmethod
    def of_checkpoint(cls, stored: Mapping[str, _Sized]) -> TensorLayout:
        """Layout of a checkpoint.

        Args:
            stored (Mapping): Name -> tensor with its full shape.
        """
        stacked = {
            name: item.shape[0]
            for name, item in stored.items()
            if item.shape and _STACKED.match(name)
        }
        if not stacked:
            return _numbered({name: disk_name(name) for name in stored})
        places: dict[Address, Address] = {}
        for name in stored:
            indices: Sequence[int | None] = range(stacked[name]) if name in stacked else (None,)
            places |= {(disk_name(name)[0], index): (name, index) for index in indices}
        return cls("*-" * max(stacked.values()), places)


def _numbered(names: Mapping[str, Address]) -> TensorLayout:
    """Layout of layers with numbers: the i-th that holds attention holds attention i."""
    numbers: dict[str, set[int]] = {part: set() for part in _PARTS.values()}
    for canonical, number in names.values():
        if number is not None and (part := _part(canonical)):
            numbers[part].add(number)
    ordinals = {
        (part, number): index
        for part, found in numbers.items()
        for index, number in enumerate(sorted(found))
    }
    # Within a layer of GPTModel attention comes first, and "*" sorts before "-".
    order = sorted((number, part) for part, number in ordinals)
    places: dict[Address, Address] = {}
    for name, (canonical, number) in names.items():
        # Layers of other kinds keep their number: there is nothing to count them by.
        index = ordinals.get((_part(canonical), number), number)
        places[canonical, index] = (name, None)
    return TensorLayout("".join(part for _, part in order), places)


def disk_name(name: str) -> Address:
    """A name as in a checkpoint of GPTModel, and the number of the layer that it belongs to."""
    while name.startswith("module."):  # DDP and Float16Module wrappers
        name = name.removeprefix("module.")
    if name.startswith(_HYBRID_FINAL_NORM):
        name = _FINAL_NORM + name.removeprefix(_HYBRID_FINAL_NORM)
    match = LAYER.fullmatch(name)
    if not match and not _STACKED.match(name):
        return name, None
    rest = match[2] if match else name.removeprefix("decoder.layers.")
    rest = _LOCAL_TO_DISK.get(rest, rest).replace(_EXPERTS_IN_MEMORY, _EXPERTS)
    return f"decoder.layers.{rest}", int(match[1]) if match else None


def _part(canonical: str) -> str:
    """`*`, `-`, or nothing for a tensor of another kind of layer."""
    rest = canonical.removeprefix("decoder.layers.")
    return next((part for prefix, part in _PARTS.items() if rest.startswith(prefix)), "")
