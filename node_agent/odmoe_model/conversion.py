"""From the names and layouts of a checkpoint to those of the running model, a few experts at a time.

The rules are transformers' own (its conversion mapping, its casts); they are run here on a model that is on the
meta device but for the parameters just asked for. Conversions that stack the experts are given some of them only,
and a model whose parameter has room for so many. Knows nothing of stores and writes nothing.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from odmoe_model.checkpoint import Checkpoint, PrepareError
from odmoe_model.family import empty_model, experts_modules

_log = logging.getLogger(__name__)
_FLOATING: Final = ("F64", "F32", "F16", "BF16")
# Experts are converted so many bytes at a time: enough that calls do not count, and at least one expert.
_PORTION_BYTES: Final = 16 << 20


class Conversion:
    """The parameters of the checkpoint's model as `from_pretrained(dtype="auto")` would load them, to the bit.

    `experts` are the (path, module) of each MoE layer's experts, on the meta device. Making one raises
    PrepareError when the model has no experts, or when tensors are missing or quantised."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._model = empty_model(checkpoint.config, dtype=checkpoint.dtype)
        self._load_config = LoadStateDictConfig(
            dtype=checkpoint.dtype,
            dtype_plan=self._model._get_dtype_plan(checkpoint.dtype),
            weight_mapping=get_model_conversion_mapping(self._model),
        )
        self.experts: list[tuple[str, nn.Module]] = experts_modules(self._model)
        if not self.experts:
            raise PrepareError(f"{checkpoint.directory} is not a Mixture of Experts: all its layers are dense")
        self._empty: dict[str, Tensor] = self._model.state_dict()
        self._expert_parameters = {f"{path}.{name}" for path, module in self.experts for name in _names(module)}
        # Target -> pattern of the conversion (None: a mere renaming) -> names in the checkpoint, in order.
        self._sources: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        self._group()
        self._refuse_incomplete()
        self._refuse_quantised()

    @property
    def non_expert_bytes(self) -> int:
        """What `non_expert` comes to, or a little more."""
        kept_in_fp32 = tuple(self._load_config.dtype_plan)
        return sum(
            empty.numel() * 4 if any(part in name for part in kept_in_fp32) else empty.nbytes
            for name, empty in self._empty.items()
            if name in self._sources and name not in self._expert_parameters
        )

    def experts_of(self, layer: int) -> Iterator[dict[str, Tensor]]:
        """The parameters [n, ...] of n experts of the MoE layer by their names in the experts module, and then
        of the next ones; may be views of the checkpoint's files."""
        path, module = self.experts[layer]
        targets = {f"{path}.{name}": name for name in _names(module)}
        for sources, num_experts in self._portions(list(targets)):
            for target in targets:
                self._set(target, self._empty[target][:num_experts])
            converted = self._convert(sources)
            yield {name: converted[target] for target, name in targets.items()}

    def non_expert(self) -> dict[str, Tensor]:
        """Every other tensor of the checkpoint by its name in the model; those of equal layout and dtype are
        views of the checkpoint's files."""
        targets = set(self._sources) - self._expert_parameters
        converted = self._convert([name for target in targets for name in self._names_for(target)])
        info = self._info(missing=set(self._empty) - set(converted) - self._expert_parameters)
        info.missing_keys -= set(self._model.all_tied_weights_keys)
        self._model._adjust_missing_and_unexpected_keys(info)
        if info.missing_keys:
            self._fail_missing(sorted(info.missing_keys))
        return converted

    def _group(self) -> None:
        mapping = self._load_config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, unexpected = self._model.base_model_prefix, set()
        for name in sorted(self._checkpoint.slices, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._empty)
            if target not in self._empty and name in self._empty:
                target, pattern = rename_source_key(name, [], [], prefix, self._empty)
            if target not in self._empty:
                unexpected.add(target)
                continue
            self._sources[target][pattern].append(name)
        self._warn_of(unexpected)

    def _warn_of(self, unexpected: set[str]) -> None:
        info = self._info(unexpected=unexpected)
        self._model._adjust_missing_and_unexpected_keys(info)
        if info.unexpected_keys:
            names = sorted(info.unexpected_keys)
            _log.warning("%d tensors have no place in the model and are left out, e.g. %s", len(names), names[0])

    def _refuse_incomplete(self) -> None:
        absent = sorted(self._expert_parameters - set(self._sources))
        if absent:
            self._fail_missing(absent)
        for target in sorted(self._expert_parameters):
            num_experts = self._empty[target].shape[0]
            for pattern, names in self._sources[target].items():
                if len(names) not in (1, num_experts):
                    raise PrepareError(
                        f"{self._checkpoint.directory} has {len(names)} tensors {pattern!r} for {target}, which takes "
                        f"{num_experts}; the checkpoint is incomplete, download it again"
                    )

    def _refuse_quantised(self) -> None:
        for target in self._sources:
            name = self._names_for(target)[0]
            dtype = self._checkpoint.slices[name].get_dtype()
            if self._empty[target].is_floating_point() and dtype not in _FLOATING:
                raise PrepareError(
                    f"{self._checkpoint.directory} is quantised: {name} is of dtype {dtype}; use the checkpoint in "
                    f"bfloat16, float16 or float32"
                )

    def _portions(self, targets: Sequence[str]) -> Iterator[tuple[list[str], int]]:
        """Names in the checkpoint of some experts' parameters, with the number of experts, from first to last."""
        lists = [names for target in targets for names in self._sources[target].values()]
        num_experts = self._empty[targets[0]].shape[0]
        if any(len(names) != num_experts for names in lists):
            # Stacked in the checkpoint already: nothing to fuse, hence nothing to hold twice.
            yield [name for names in lists for name in names], num_experts
            return
        expert_bytes = sum(self._empty[target].nbytes for target in targets) // num_experts
        step = max(1, _PORTION_BYTES // expert_bytes)
        for first in range(0, num_experts, step):
            yield [name for names in lists for name in names[first : first + step]], min(step, num_experts - first)

    def _names_for(self, target: str) -> list[str]:
        return [name for names in self._sources[target].values() for name in names]

    def _convert(self, sources: Sequence[str]) -> dict[str, Tensor]:
        slices = {name: self._checkpoint.slices[name] for name in sources}
        info, _ = convert_and_load_state_dict_in_model(self._model, slices, self._load_config, None)
        flaws = [f"{name}: {str(error).strip()}" for name, error in info.conversion_errors.items()]
        flaws += [f"{name} is {tuple(got)}, not {tuple(want)}" for name, got, want in info.mismatched_keys]
        if flaws:
            raise PrepareError(
                f"{self._checkpoint.directory} does not fit its configuration ({flaws[0]}); tensors are "
                f"missing or of a wrong shape, download the checkpoint again"
            )
        converted = {name: tensor for name, tensor in self._model.state_dict().items() if not tensor.is_meta}
        for name in converted:
            self._set(name, self._empty[name])
        return converted

    def _set(self, name: str, empty: Tensor) -> None:
        """Put a tensor on the meta device in the place of a parameter or a buffer."""
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        setattr(module, leaf, empty if leaf in module._buffers else nn.Parameter(empty, requires_grad=False))

    def _info(self, *, missing: set[str] | None = None, unexpected: set[str] | None = None) -> LoadStateDictInfo:
        return LoadStateDictInfo(
            missing_keys=missing or set(),
            unexpected_keys=unexpected or set(),
            mismatched_keys=set(),
            conversion_errors={},
            error_msgs=[],
            skipped_pp_keys=set(),
        )

    def _fail_missing(self, names: Sequence[str]) -> None:
        raise PrepareError(
            f"{self._checkpoint.directory} lacks {len(names)} tensors of the model ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}); the checkpoint is incomplete, download it again"
        )


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]
