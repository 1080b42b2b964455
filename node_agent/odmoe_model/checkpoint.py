"""A checkpoint to be prepared: is it one we can read, and which tensors does it hold?

Every refusal that can be made without reading weights is made here. Runs no code of the checkpoint, opens no
pickle. Knows nothing of how a store is laid out.
"""

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.modeling_utils import _get_dtype
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from odmoe_model.family import SUPPORTED_FAMILIES, experts_class
from odmoe_model.manifest import MANIFEST_FILE, StoreError
from odmoe_model.tensors import DTYPE_NAME

_log = logging.getLogger(__name__)
PICKLED_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
# Of no meaning to the model; they would make two stores of one checkpoint differ.
_INCIDENTAL_KEYS: Final = ("_name_or_path", "transformers_version", "auto_map")


class PrepareError(StoreError):
    """A store cannot be made; the message says why and what to do."""


class Checkpoint:
    """The safetensors checkpoint in a directory, opened; a context manager that closes the files again.

    `raw_config` is what its config.json says, `dtype` what `from_pretrained(dtype="auto")` would load it as,
    `slices` each tensor by its name in the files, not read yet (`[...]` reads, `get_shape`, `get_dtype`)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.raw_config = _read_config(directory)
        self.config = _parse_config(directory)
        self._files = ExitStack()
        weight_map = _weight_files(directory)
        self.slices: dict[str, Any] = {}
        for file in sorted(weight_map):
            self.slices.update(self._open(directory / file, expected=weight_map[file]))
        paths = [str(directory / file) for file in sorted(weight_map)]
        self.config, self.dtype = _get_dtype("auto", paths, self.config, None, None, True)
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise PrepareError(f"{directory} is of dtype {self.dtype}; use one in float32, float16 or bfloat16")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.slices.clear()
        self._files.close()

    @property
    def clean_config(self) -> dict[str, Any]:
        """`raw_config` without what has no bearing on the model, with the dtype that was settled on."""
        kept = {key: value for key, value in self.raw_config.items() if key not in _INCIDENTAL_KEYS}
        return {**kept, "dtype": DTYPE_NAME[self.dtype]}

    def _open(self, path: Path, *, expected: set[str] | None) -> dict[str, Any]:
        try:
            # Maps the file; its length and header are checked against each other here.
            handle = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise PrepareError(
                f"{path} is truncated or altered ({error}); download this file of the checkpoint again"
            ) from error
        names = set(handle.keys())
        if expected is not None and names != expected:
            strays = sorted(names ^ expected)
            raise PrepareError(
                f"{path} does not hold the tensors that {SAFE_WEIGHTS_INDEX_NAME} says it holds ({len(strays)} "
                f"differ, {strays[0]!r} for one); download the checkpoint again"
            )
        return {name: handle.get_slice(name) for name in names}


def _read_config(directory: Path) -> dict[str, Any]:
    """config.json, after every check that needs nothing else."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise PrepareError(
            f"{directory} is no checkpoint: it has no {CONFIG_NAME}; name the directory a model was saved or "
            f"downloaded to"
        )
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise PrepareError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise PrepareError(f"{path} names no model_type; this is no checkpoint transformers can read")
    _refuse_quantised(directory, raw)
    _refuse_family(directory, raw)
    return raw


def _parse_config(directory: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise PrepareError(
            f"transformers does not accept {directory / CONFIG_NAME} ({str(error).strip()}); download it again"
        ) from error


def _refuse_quantised(directory: Path, raw: dict[str, Any]) -> None:
    quantisation = raw.get("quantization_config") or raw.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method", "an unnamed method")
        raise PrepareError(
            f"{directory} is quantised with {method}, which cannot be read; use the checkpoint in bfloat16, "
            f"float16 or float32, or save a dequantised one with transformers"
        )


def _refuse_family(directory: Path, raw: dict[str, Any]) -> None:
    model_type, supported = raw["model_type"], ", ".join(SUPPORTED_FAMILIES)
    if model_type in SUPPORTED_FAMILIES:
        _refuse_remote_code(directory, raw)
    elif raw.get("auto_map"):
        raise PrepareError(
            f"{directory} needs code of its own (auto_map), which is never run; use a checkpoint of a family "
            f"that transformers has itself: {supported}"
        )
    elif model_type not in CONFIG_MAPPING:
        raise PrepareError(
            f"{directory} is of the family {model_type!r}, which transformers does not know; supported are: {supported}"
        )
    elif _has_experts(CONFIG_MAPPING[model_type]):
        raise PrepareError(
            f"{directory} is of the family {model_type!r}, which was never tested here; supported are: {supported}"
        )
    else:
        raise PrepareError(
            f"{directory} is not a Mixture of Experts that can be served: the family {model_type!r} has no "
            f"experts behind transformers' experts interface; supported are: {supported}"
        )


def _refuse_remote_code(directory: Path, raw: dict[str, Any]) -> None:
    """Makers often left the file in from which transformers took its own class; then that class is used. A class
    of another name is other mathematics."""
    auto_map = raw.get("auto_map") or {}
    config_type = CONFIG_MAPPING[raw["model_type"]]
    native = {config_type.__name__.lower(), MODEL_FOR_CAUSAL_LM_MAPPING[config_type].__name__.lower()}
    for purpose in ("AutoConfig", "AutoModelForCausalLM"):
        remote = auto_map.get(purpose)
        if remote is not None and str(remote).rpartition(".")[2].lower() not in native:
            raise PrepareError(
                f"{directory} needs code of its own ({purpose}: {remote!r} in auto_map), which is never run; use "
                f"a checkpoint that transformers loads without trust_remote_code"
            )
    if auto_map:
        _log.warning("%s brings code of its own; transformers' own classes are used, that code is not run", directory)


def _has_experts(config_type: type[PreTrainedConfig]) -> bool:
    if config_type not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    try:
        experts_class(config_type())
    except AssertionError:
        return False
    return True


def _weight_files(directory: Path) -> dict[str, set[str] | None]:
    """The checkpoint's safetensors files, each with the tensors its index says are in it (None without index)."""
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return {SAFE_WEIGHTS_NAME: None}
    index_path = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index_path.is_file():
        _refuse_no_weights(directory)
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_bytes())["weight_map"]
        files: dict[str, set[str] | None] = {
            file: {name for name, place in weight_map.items() if place == file} for file in set(weight_map.values())
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepareError(f"{index_path} is damaged ({error!r}); download it again") from error
    strange = [file for file in files if Path(file).name != file]
    if strange:
        raise PrepareError(f"{index_path} points outside of its directory ({strange[0]!r}); refused")
    missing = sorted(file for file in files if not (directory / file).is_file())
    if missing:
        raise PrepareError(
            f"{directory} lacks {len(missing)} of its {len(files)} files of weights ({', '.join(missing)}); "
            f"download what is missing"
        )
    return files


def _refuse_no_weights(directory: Path) -> None:
    if (directory / MANIFEST_FILE).is_file():
        raise PrepareError(f"{directory} is an expert store already; there is nothing to prepare")
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise PrepareError(
            f"{directory} has its weights as pickle only ({pickled[0]}), which can run any code and is never "
            f"opened; save them as safetensors (save_pretrained of transformers does)"
        )
    raise PrepareError(f"{directory} has no weights: no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
