"""The gates of a store's model by themselves: what each MoE layer's own router would choose for given rows.

Each gate is the family's own module out of the transformers skeleton; nothing of it is rewritten here. Knows what the
supported families call it, and that lfm2_moe's block hands it a bias.

T token rows, H hidden size, K experts a token.
"""

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from odmoe_model.family import experts_modules
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore


class RoutersError(ValueError):
    """The gates of a family are not where they are looked for."""


class Router:
    """One MoE layer's gate; `extra` are the arguments its block passes besides the rows."""

    def __init__(self, module: Any, extra: tuple[Tensor | None, ...]) -> None:
        self.module = module
        self.extra = extra

    def __call__(self, x_TH: Tensor) -> Tensor:
        """index_TK: the experts of each row, as the family orders them."""
        return self.routed(x_TH)[1]

    def routed(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_TE of all experts, index_TK of the chosen ones)."""
        logits_TE, _, index_TK = self.module(x_TH, *self.extra)
        return logits_TE, index_TK

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights and buffers."""
        tensors = [*self.module.parameters(), *self.module.buffers(), *(t for t in self.extra if t is not None)]
        return sum(tensor.nbytes for tensor in tensors)


def routers_of(model: nn.Module, *, family: str) -> list[Router]:
    """The gates of a transformers model, MoE layer by MoE layer; they stay the model's. Raises RoutersError."""
    return [_router(model.get_submodule(path.rpartition(".")[0]), family) for path, _ in experts_modules(model)]


def load_routers(store: ExpertStore) -> list[Router]:
    """The gates of the store's model on the CPU; nothing else of the model is kept. Raises RoutersError."""
    model = load_skeleton(store, device="cpu")
    # Copied out of the mapped file, so that the rest of it can be let go of.
    return deepcopy(routers_of(model, family=store.manifest.model_type))


def _router(block: Any, family: str) -> Router:
    module = getattr(block, "gate", None) or getattr(block, "router", None)
    if module is None:
        raise RoutersError(f"the gates of {family} models are not known here, so they cannot forecast")
    # Only lfm2_moe keeps its gate's bias outside the gate, and passes none where it is not used.
    extra = (block.expert_bias if block.use_expert_bias else None,) if family == "lfm2_moe" else ()
    return Router(module, extra)
