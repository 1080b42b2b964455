"""Tensors to blobs and back, every dtype, and who copies."""

from typing import get_args

import pytest
import torch

from odmoe_model.tensors import TORCH_DTYPE, from_blob, to_blob
from odmoe_wire.codec import Dtype


@pytest.mark.parametrize("dtype", get_args(Dtype))
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (), (2, 1, 3)])
def test_round_trip(dtype: Dtype, shape: tuple[int, ...]):
    tensor = torch.randint(0, 100, shape).to(TORCH_DTYPE[dtype])
    blob = to_blob(tensor)
    assert (blob.dtype, blob.shape, len(blob.data)) == (dtype, shape, tensor.nbytes)
    back = from_blob(blob)
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_contiguous_tensors_are_lent_and_others_copied():
    tensor = torch.zeros(4, 6)
    blob, transposed = to_blob(tensor), to_blob(tensor.t())
    tensor[0, 1] = 7.0
    assert from_blob(blob)[0, 1] == 7.0
    assert from_blob(transposed)[1, 0] == 0.0


def test_what_was_received_is_copied_to_aligned_memory():
    received = bytes(1) + bytes(to_blob(torch.arange(8.0)).data)
    blob = to_blob(torch.arange(8.0))
    back = from_blob(type(blob)(dtype="float32", shape=(8,), data=memoryview(received)[1:]))
    assert back.tolist() == list(range(8))
    assert back.data_ptr() % 64 == 0
    back.zero_()
    assert received[5:9] != bytes(4)
