"""Any rival of a store by its name. Knows all of them."""

from pathlib import Path
from typing import assert_never

from odmoe_model.store import ExpertStore
from odmoe_predictor.config import RivalKind
from odmoe_predictor.rivals.base import Rival, Shape
from odmoe_predictor.rivals.frequency import FrequencyRival
from odmoe_predictor.rivals.gate import GateRival
from odmoe_predictor.rivals.previous import PreviousRival
from odmoe_predictor.rivals.random import RandomRival
from odmoe_predictor.rivals.trained import TrainedRival
from odmoe_predictor.rivals.weights import load


def make_rival(kind: RivalKind, store: ExpertStore, *, look_ahead: int = 1, weights: Path | None = None) -> Rival:
    """`look_ahead` is for gate; `weights` are for trained, which needs them. Raises ValueError, which says what of it
    cannot be used and why."""
    shape = Shape.of(store.manifest)
    match kind:
        case "random":
            return RandomRival(shape)
        case "frequency":
            return FrequencyRival(shape)
        case "previous":
            return PreviousRival()
        case "gate":
            return GateRival.load(store, look_ahead=look_ahead)
        case "trained":
            assert weights is not None, "the settings see to it"
            return TrainedRival(load(weights, shape=shape, store_digest=store.manifest.digest))
        case _:
            assert_never(kind)
