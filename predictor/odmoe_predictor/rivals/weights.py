"""The file of a trained rival: safetensors whose metadata say for which model it is. Nothing in it runs.

Knows the shapes a file must have before any of it is used. Raises WeightsError, which names the file.
"""

from pathlib import Path
from typing import Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from odmoe_model.trace import MAX_EXPERTS, MAX_LAYERS
from odmoe_predictor.rivals.base import Shape
from odmoe_predictor.rivals.trained import ExpertScores

VERSION: Final = 1
MAX_WIDTH: Final = 65_536
_KEY: Final = "odmoe_rival"


class WeightsError(ValueError):
    """A file of weights cannot be used; the message names it and says why."""


class WeightsHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the metadata say: the model the weights are for, and their own shape."""

    version: int = VERSION
    store_digest: str
    num_layers: int
    num_experts: int
    top_k: int
    look_ahead: int
    width: int

    @property
    def shape(self) -> Shape:
        """The model's."""
        return Shape(num_layers=self.num_layers, num_experts=self.num_experts, top_k=self.top_k)


def save(model: ExpertScores, path: Path, *, store_digest: str) -> None:
    """Write the file. Raises OSError."""
    header = WeightsHeader(
        store_digest=store_digest,
        num_layers=model.shape.num_layers,
        num_experts=model.shape.num_experts,
        top_k=model.shape.top_k,
        look_ahead=model.look_ahead,
        width=model.width,
    )
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={_KEY: msgspec.json.encode(header).decode()})


def load(path: Path, *, shape: Shape, store_digest: str) -> ExpertScores:
    """The model in the file, if it was trained for this store. Raises WeightsError."""
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            _check_model(path, header, shape, store_digest)
            with torch.device("meta"):
                model = ExpertScores(shape, look_ahead=header.look_ahead, width=header.width)
            expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                raise WeightsError(f"{path} holds tensors {found}, its header asks for {expected}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise WeightsError(f"{path}: {name} has values that are no finite float32")
    model.load_state_dict(tensors, assign=True)
    return model


def _header(path: Path, metadata: dict[str, str]) -> WeightsHeader:
    try:
        header = msgspec.json.decode(metadata.get(_KEY, ""), type=WeightsHeader)
    except msgspec.MsgspecError as error:
        raise WeightsError(f"{path} is no file of odmoe train-predictor: {error}") from None
    if header.version != VERSION:
        raise WeightsError(f"{path} is of version {header.version}; this is for version {VERSION}: train it again")
    fits = (
        1 <= header.num_layers <= MAX_LAYERS
        and 1 <= header.top_k <= header.num_experts <= MAX_EXPERTS
        and 1 <= header.look_ahead <= header.num_layers
        and 1 <= header.width <= MAX_WIDTH
    )
    if not fits:
        raise WeightsError(f"{path} is for a model there cannot be: {header}")
    return header


def _check_model(path: Path, header: WeightsHeader, shape: Shape, store_digest: str) -> None:
    if header.shape != shape:
        raise WeightsError(f"{path} is for {header.shape}, the store is {shape}: train it on traces of this model")
    if header.store_digest != store_digest:
        raise WeightsError(
            f"{path} is for the store {header.store_digest[:16]}, this is {store_digest[:16]}: train it on traces of "
            f"this model"
        )
