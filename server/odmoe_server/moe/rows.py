"""Single tokens of several sequences in one forward of the stock model, for the bits each would have in its own.

A step of many lanes (`moe.lanes`) costs a forward for each. Here they are the rows of one, and what depends on a
row's company is done apart: every row attends to its own sequence's keys and values, in a call of its own, and weights
are multiplied as `odmoe_model.runs` found to be exact on this machine. Curves (exponentials and their like) are
computed in another way for the last few of many numbers, so each row is given to them by itself unless it fills whole
vectors. All else that models do to a token goes row by row in the kernels themselves, with one thread. Whether that
holds for a model is tried out once, with the model itself (`Rows.tried`); where it does not, or a cache is more than
keys and values that grow, lanes serve.

Shape suffixes: R rows, h key-value heads, S positions, D head dimension, H hidden size, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from odmoe_model.runs import MOST_TOGETHER, blocks_agree, linear_by_blocks, linear_together, rows_agree
from odmoe_model.seam import ExpertsCall
from odmoe_server.moe.lanes import Lane, Meeting, run_lanes

log = logging.getLogger(__name__)

ATTENTION: Final = "odmoe_rows"
# What a model is tried with: prompts, and the tokens each of them goes on with in one step.
_TRIAL: Final = ((range(3, 12), (5, 7, 1)), (range(20, 25), (9,)), (range(7, 24), (2, 3)))
# Numbers that the machine computes at once, or a divisor of it.
_VECTOR: Final = 64


def _named(*names: str) -> frozenset[Any]:
    """Functions as torch calls them, wherever it has them."""
    places = (torch, Tensor, torch.nn.functional, torch.special)
    return frozenset(getattr(place, name) for place in places for name in names if hasattr(place, name))


# Products other than `linear`.
_OTHER_PRODUCTS: Final = _named(
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv", "dot", "inner"
)
_CURVES: Final = _named(
    *("cos", "sin", "exp", "exp2", "expm1", "expit", "log", "log2", "log1p", "tanh", "sigmoid", "erf", "silu", "gelu"),
    *("mish", "elu", "selu", "celu", "softplus", "logsigmoid", "pow", "__pow__", "float_power"),
)


class Rows:
    """One model's forward of several rows; `run` has the signature of `run_lanes`."""

    def __init__(self, model: PreTrainedModel) -> None:
        AttentionInterface.register(ATTENTION, _attend)
        self._model = model
        self._products = _Products()

    @classmethod
    def tried(cls, model: PreTrainedModel, new_cache: Callable[[], DynamicCache]) -> "Rows | None":
        """None where lanes have to serve. `meet` must be installed in the model."""
        config = model.config.get_text_config()
        if model.device.type != "cpu" or config._attn_implementation != "sdpa" or torch.get_num_threads() > 1:
            return None
        rows = cls(model)
        try:
            if rows._agrees_with_lanes(new_cache):
                return rows
            log.info("rows of several sequences cannot share a forward bit by bit: they go one by one")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # A family's code may do with keys and values what rows cannot have done to them.
            log.info("rows of several sequences cannot share a forward (%s): they go one by one", error)
        return None

    def fits(self, lanes: Sequence[Lane]) -> bool:
        """Whether lanes can be rows: several, of one token each, in caches of keys and values that grow."""
        return len(lanes) > 1 and all(
            len(lane.ids) == 1
            and not lane.is_prompt
            and all(type(layer) is DynamicLayer for layer in lane.cache.layers)
            for lane in lanes
        )

    @torch.inference_mode()
    def run(self, lanes: Sequence[Lane], meeting: Meeting) -> list[Tensor]:
        """See `run_lanes`; for lanes that fit."""
        config = self._model.config
        former = config._attn_implementation
        config._attn_implementation = ATTENTION
        forward = greenlet(self._forward)
        try:
            came = forward.switch(lanes)
            while not forward.dead:
                self._products.paused = True
                outputs = meeting(lanes, _apart(came))
                self._products.paused = False
                came = forward.switch(torch.cat(outputs))
            return list(came)
        finally:
            config._attn_implementation = former
            if not forward.dead:
                forward.throw(GreenletExit)

    def _forward(self, lanes: Sequence[Lane]) -> Tensor:
        device = self._model.device
        self._products.paused, self._products.num_rows = False, len(lanes)
        # Looking at every operation takes its time.
        with nullcontext() if self._products.are_plain and len(lanes) <= MOST_TOGETHER else self._products:
            output = self._model(
                input_ids=torch.tensor([list(lane.ids) for lane in lanes], device=device),
                position_ids=torch.tensor([[lane.position] for lane in lanes], device=device),
                past_key_values=_RowsCache(lanes),
                use_cache=True,
                logits_to_keep=1,
            )
        logits_RV: Tensor = output.logits[:, -1]
        return logits_RV

    def _agrees_with_lanes(self, new_cache: Callable[[], DynamicCache]) -> bool:
        """Same tokens both ways, each expert giving back what it gets."""
        alone, together = _begun(self._model, new_cache), _begun(self._model, new_cache)
        if not self.fits(together):
            return False
        expected = run_lanes(self._model, alone, _no_experts)
        found = self.run(together, _no_experts)
        self._products.judge()
        kept = zip(_held(alone), _held(together), strict=True)
        return all(torch.equal(*pair) for pair in zip(expected, found, strict=True)) and all(
            torch.equal(*pair) for pair in kept
        )


class _RowsCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The caches of all rows; those of one sequence follow one another."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        super().__init__(layers=lanes[0].cache.layers)
        self._start = lanes[0].position
        self._caches: list[tuple[Cache, list[int]]] = []  # with the length each row leaves
        for lane in lanes:
            if not self._caches or self._caches[-1][0] is not lane.cache:
                self._caches.append((lane.cache, []))
            self._caches[-1][1].append(lane.position + 1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """For each row its own keys and values [1, h, S, D], which only `_attend` understands."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        sizes = [len(lengths) for _, lengths in self._caches]
        parts = zip(torch.split(key_states, sizes), torch.split(value_states, sizes), strict=True)
        for (cache, lengths), (key_RhSD, value_RhSD) in zip(self._caches, parts, strict=True):
            # [R, h, 1, D] to [1, h, R, D]
            key_1hSD, value_1hSD = cache.update(key_RhSD.transpose(0, 2), value_RhSD.transpose(0, 2), layer_idx)
            for length in lengths[:-1]:
                keys.append(key_1hSD[:, :, :length])
                values.append(value_1hSD[:, :, :length])
            keys.append(key_1hSD)
            values.append(value_1hSD)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the first row; positions are given to the model."""
        return self._start


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Each row of the query [R, h, 1, D] with its own keys and values; nothing of them is hidden from it."""
    parts = zip(torch.split(query, 1), key, value, strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts]), None


class _Products(TorchFunctionMode):
    """While it is entered, each row is multiplied and curved as if it were alone. `paused` while others compute.

    `are_plain` is told by the trial: there was nothing that rows cannot have done to them together. Raises
    NotImplementedError for a sum of products that is no `linear`: nobody knows how that rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.num_rows = 1
        self.are_plain = False
        self._all_agreed = True

    def judge(self) -> None:
        """After a forward of the model."""
        self.are_plain = self._all_agreed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        if func is linear:
            return self._linear(*args, **(kwargs or {}))
        if func in _CURVES and (args[0].numel() // self.num_rows) % _VECTOR:
            return self._curve(func, *args, **(kwargs or {}))
        if func in _OTHER_PRODUCTS and not (isinstance(args[0], Tensor) and args[0].shape[-1] == 1):
            raise NotImplementedError(f"{func.__name__} of several rows")
        return func(*args, **(kwargs or {}))

    def _curve(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each of the rows by itself."""
        self._all_agreed = False
        if x.shape[0] != self.num_rows:
            raise NotImplementedError(f"{func.__name__} of {list(x.shape)}")
        return torch.cat([func(row, *args, **kwargs) for row in torch.split(x, 1)])

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows [R, H] or [R, 1, H] times the weight."""
        if rows_agree(weight, bias):
            return linear_together(x, weight, bias)
        self._all_agreed = False
        if bias is None and blocks_agree(weight):
            return linear_by_blocks(x.reshape(x.shape[0], -1), weight).reshape(*x.shape[:-1], -1)
        return torch.cat([linear(row, weight, bias) for row in torch.split(x, 1)])


def _apart(call: ExpertsCall) -> list[ExpertsCall]:
    """A call of all rows as one for each lane."""
    parts = zip(torch.split(call.x_TH, 1), torch.split(call.index_TK, 1), torch.split(call.weight_TK, 1), strict=True)
    return [
        ExpertsCall(layer=call.layer, module=call.module, x_TH=x_TH, index_TK=index_TK, weight_TK=weight_TK)
        for x_TH, index_TK, weight_TK in parts
    ]


def _begun(model: PreTrainedModel, new_cache: Callable[[], DynamicCache]) -> list[Lane]:
    """What a model is tried with, its prompts in the caches."""
    lanes = []
    for sequence, (prompt, fresh) in enumerate(_TRIAL):
        cache = new_cache()
        ids = list(prompt)
        run_lanes(model, [Lane(sequence=sequence, position=0, ids=ids, cache=cache, is_prompt=True)], _no_experts)
        lanes += [
            Lane(sequence=sequence, position=position, ids=[token_id], cache=cache)
            for position, token_id in enumerate(fresh, len(ids))
        ]
    return lanes


def _held(lanes: Sequence[Lane]) -> list[Tensor]:
    return [tensor for lane in lanes for layer in lane.cache.layers for tensor in (layer.keys, layer.values)]


def _no_experts(lanes: Sequence[Lane], calls: Sequence[ExpertsCall]) -> list[Tensor]:
    return [call.x_TH.clone() for call in calls]
