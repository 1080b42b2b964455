"""Tensors as blobs of the wire and back, and the names dtypes have there. Knows nothing of messages."""

from typing import Final, get_args

import torch
from torch import Tensor

from odmoe_wire.codec import Blob, Dtype

TORCH_DTYPE: Final[dict[Dtype, torch.dtype]] = {name: getattr(torch, name) for name in get_args(Dtype)}
DTYPE_NAME: Final[dict[torch.dtype, Dtype]] = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def to_blob(tensor: Tensor) -> Blob:
    """The tensor's values as a blob; a contiguous CPU tensor is lent, not copied, and must not be written to
    while the blob is on its way."""
    values = tensor.detach()
    if not (values.is_cpu and values.is_contiguous()):
        values = values.cpu().contiguous()
    return Blob(dtype=DTYPE_NAME[tensor.dtype], shape=tuple(tensor.shape), data=as_bytes(values))


def from_blob(blob: Blob) -> Tensor:
    """The blob as a CPU tensor of its own. Copied: what a link received is read-only, which torch has no notion
    of, and lies on any address, which matrix products may answer with other last bits."""
    values = torch.empty(blob.shape, dtype=TORCH_DTYPE[blob.dtype])
    as_bytes(values)[:] = memoryview(blob.data).cast("B")
    return values


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied; numpy cannot name bfloat16, so by way of uint8."""
    if tensor.dtype is torch.bfloat16 or tensor.numel() == 0:
        return tensor.view(-1).view(torch.uint8).numpy().data
    return tensor.numpy().data.cast("B")
