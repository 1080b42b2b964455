"""What a family of models is to transformers: its classes, its empty model, its experts modules.

The only place that knows which families are supported. Knows nothing of stores, files or weights.
"""

import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Each is covered by tests/parity; a family joins this list by joining those tests.
SUPPORTED_FAMILIES: tuple[str, ...] = (
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "lfm2_moe",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)


def build_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The configuration object of a supported family from the dictionary a checkpoint's config.json holds."""
    model_type = config["model_type"]
    assert model_type in SUPPORTED_FAMILIES, model_type
    return CONFIG_MAPPING[model_type].from_dict(config)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model class transformers ships for the configuration."""
    architecture: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return architecture


def experts_class(config: PreTrainedConfig) -> type[nn.Module]:
    """The family's own class of stacked experts: the one in its modelling file that transformers' decorator
    `use_experts_implementation` marked."""
    modelling = sys.modules[model_class(config).__module__]
    marked = [
        candidate
        for candidate in vars(modelling).values()
        if isinstance(candidate, type) and issubclass(candidate, nn.Module) and hasattr(candidate, "_apply_gate")
    ]
    assert len(marked) == 1, f"{modelling.__name__} has {len(marked)} experts classes"
    return marked[0]


def empty_model(config: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model with every parameter and buffer on the meta device, built as `from_pretrained` builds it."""
    architecture = model_class(config)
    config.dtype = dtype
    with ExitStack() as contexts:
        for context in architecture.get_init_context(dtype, False, False, None):
            contexts.enter_context(context)
        return architecture(config)


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of each MoE layer's experts in the order of the layers; the position in this list is what
    is called `layer` everywhere."""
    return [(path, module) for path, module in model.named_modules() if hasattr(type(module), "_apply_gate")]
