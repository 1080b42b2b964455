"""The stock transformers model around the experts: every weight but theirs, which stay on the meta device.

Goes the way `from_pretrained` goes from the empty model to the ready one, so that buffers, tied weights, dtypes
and the attention implementation come out the same. Knows nothing of who computes the experts (`seam`).
"""

from threading import Lock
from typing import Any, Final

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import GENERATION_CONFIG_NAME

from odmoe_model.family import build_config, empty_model, experts_modules
from odmoe_model.quiet import no_loading_bars
from odmoe_model.store import ExpertStore
from odmoe_model.tensors import TORCH_DTYPE

# While transformers builds a model it replaces functions and the default dtype of torch for the whole process. Two
# threads at once would leave some replaced for good, and every later model of this process with wrong rotary buffers.
_BUILDING: Final = Lock()


def load_skeleton(store: ExpertStore, *, device: torch.device | str) -> PreTrainedModel:
    """The store's model with its non-expert weights on `device`, in evaluation mode. On the CPU they are views
    of the store's file. The experts' parameters are never allocated: they are on the meta device."""
    with _BUILDING:
        model = _build(store, torch.device(device))
    model.generation_config = load_generation_config(store)
    return model.eval()


def _build(store: ExpertStore, device: torch.device) -> PreTrainedModel:
    dtype = TORCH_DTYPE[store.manifest.dtype]
    model = empty_model(build_config(store.manifest.config), dtype=dtype)
    # Each stored tensor has its final name and dtype: no mapping, and each parameter takes the stored dtype.
    load_config = LoadStateDictConfig(device_map={"": device}, dtype=dtype, dtype_plan=model._get_dtype_plan(dtype))
    with no_loading_bars():
        loaded, _ = convert_and_load_state_dict_in_model(model, dict(store.non_expert()), load_config, None)
        expert_parameters = {
            f"{path}.{name}" for path, module in experts_modules(model) for name, _ in module.named_parameters()
        }
        loaded.missing_keys -= expert_parameters
        model._finalize_model_loading(model, load_config, loaded)
    return model


def load_tokenizer(store: ExpertStore) -> Any:
    """The tokenizer that came with the checkpoint; none of its code is run. Raises OSError or ValueError of
    transformers when there was none."""
    return AutoTokenizer.from_pretrained(store.tokenizer_dir, local_files_only=True, trust_remote_code=False)


def load_generation_config(store: ExpertStore) -> GenerationConfig:
    """The checkpoint's generation defaults: from its own file, else from what its configuration says."""
    if (store.path / GENERATION_CONFIG_NAME).exists():
        return GenerationConfig.from_pretrained(store.path, local_files_only=True)
    return GenerationConfig.from_model_config(build_config(store.manifest.config))
