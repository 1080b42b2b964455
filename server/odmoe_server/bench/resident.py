"""Plain transformers with every weight in memory, measured in a process of its own: what all else is compared with.

Run as a module by `odmoe bench decode`, with a job as JSON on standard input; writes what it found as JSON to standard
output. Knows stores and transformers' own experts implementations; nothing of nodes or predictors.

E experts; V vocabulary; B batch, T tokens.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import msgspec
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from odmoe_model.family import experts_modules
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_wire.lifeline import end_with_parent

IMPLEMENTATIONS: Final = ("eager", "batched_mm", "grouped_mm")
# transformers' batched_mm copies the weights of an expert for each token that uses it; more than this is not tried.
_MOST_COPIED_BYTES: Final = 2_000_000_000


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Decode `tokens` tokens after each of `prompts`; only take the first token after each of `first_prompts`."""

    store: str
    prompts: list[list[int]]
    first_prompts: list[list[int]]
    tokens: int
    implementations: list[str]


class Decoded(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt's answer. `decode_s` is from the first token to the last."""

    tokens: list[int]
    decode_s: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What one implementation did: an answer for each prompt, seconds to the first token for each of the first
    prompts. `reason` says why something was not measured."""

    implementation: str
    answers: list[Decoded] = []
    first_s: list[float] = []
    reason: str = ""

    @property
    def tokens_per_s(self) -> list[float]:
        """For each answer; the first token, which the prompt gives, is not counted."""
        return [(len(answer.tokens) - 1) / answer.decode_s for answer in self.answers]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. `main_s` and `expert_s` are what a layer takes outside its experts and what one expert takes, in
    eager decoding; `weight_bytes` are those of all weights, as they are held."""

    measured: list[Measured]
    main_s: float
    expert_s: float
    weight_bytes: int


def load_resident(store: ExpertStore) -> PreTrainedModel:
    """The store's model as `from_pretrained` would have it: every weight in memory."""
    model = load_skeleton(store, device="cpu")
    for layer, (_, module) in enumerate(experts_modules(model)):
        records = [store.fields(store.record(layer, expert)) for expert in range(store.manifest.num_experts)]
        for name in records[0]:
            stacked_E = torch.stack([fields[name] for fields in records])
            setattr(module, name, nn.Parameter(stacked_E, requires_grad=False))
    return model


class Resident:
    """A model that answers one prompt after another, greedily, one token a step, with a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    @torch.inference_mode()
    def answer(
        self, prompt: Sequence[int], *, tokens: int, on_first: Callable[[], None] = lambda: None
    ) -> tuple[Decoded, float]:
        """So many tokens, end tokens or not, and the seconds to the first of them, after which `on_first` is called."""
        cache = DynamicCache(config=self._model.config)
        began_s = perf_counter()
        found = [self._step(prompt, cache)]
        first_s = perf_counter() - began_s
        on_first()
        began_s = perf_counter()
        while len(found) < tokens:
            found.append(self._step(found[-1:], cache))
        return Decoded(tokens=found, decode_s=perf_counter() - began_s), first_s

    def _step(self, tokens: Sequence[int], cache: DynamicCache) -> int:
        ids_BT = torch.tensor([list(tokens)])
        output = self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_V: Tensor = output.logits[0, -1]
        return int(logits_V.argmax())


def measure(job: Job, model: Any, *, expert_bytes: int, top_k: int) -> list[Measured]:
    """Each implementation in turn; one that transformers cannot run here says why."""
    found = []
    for implementation in job.implementations:
        longest = max(map(len, [*job.prompts, *job.first_prompts]))
        if implementation == "batched_mm" and longest * top_k * expert_bytes > _MOST_COPIED_BYTES:
            job_of_it = msgspec.structs.replace(job, first_prompts=[])
            reason = f"no prompt of {longest} tokens: it would copy {longest * top_k * expert_bytes / 1e9:.1f} GB"
        else:
            job_of_it, reason = job, ""
        try:
            model.set_experts_implementation(implementation)
            answers, first_s = _run(job_of_it, Resident(model))
        except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
            found.append(Measured(implementation=implementation, reason=f"transformers: {error}"))
            continue
        found.append(Measured(implementation=implementation, answers=answers, first_s=first_s, reason=reason))
    return found


def _run(job: Job, resident: Resident) -> tuple[list[Decoded], list[float]]:
    resident.answer(job.prompts[0], tokens=2)  # whatever happens once only
    answers = [resident.answer(prompt, tokens=job.tokens)[0] for prompt in job.prompts]
    return answers, [resident.answer(prompt, tokens=1)[1] for prompt in job.first_prompts]


def share(model: Any, prompt: Sequence[int], *, tokens: int, top_k: int) -> tuple[float, float]:
    """(seconds of a layer outside its experts, seconds of one expert), in eager decoding."""
    modules = experts_modules(model)
    model.set_experts_implementation("eager")
    watch = _Watch(perf_counter)
    hooks = [hook for _, module in modules for hook in watch.on(module)]
    try:
        decoded, _ = Resident(model).answer(prompt, tokens=tokens, on_first=watch.reset)
    finally:
        for hook in hooks:
            hook.remove()
    num_calls = (tokens - 1) * len(modules)
    return (decoded.decode_s - watch.total_s) / num_calls, watch.total_s / num_calls / top_k


class _Watch:
    """Seconds spent in modules."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began_s = clock, 0.0
        self.total_s = 0.0

    def on(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]

    def reset(self) -> None:
        self.total_s = 0.0

    def _begin(self, *_: Any) -> None:
        self._began_s = self._clock()

    def _end(self, *_: Any) -> None:
        self.total_s += self._clock() - self._began_s


def main() -> None:
    """Do the job on standard input."""
    end_with_parent(signal.SIGTERM)
    torch.set_num_threads(1)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    store = ExpertStore.open(Path(job.store), verify=False)
    model, manifest = load_resident(store), store.manifest
    del store
    measured = measure(job, model, expert_bytes=manifest.record_bytes, top_k=manifest.top_k)
    main_s, expert_s = share(model, job.prompts[0], tokens=min(job.tokens, 16), top_k=manifest.top_k)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    found = Found(measured=measured, main_s=main_s, expert_s=expert_s, weight_bytes=weight_bytes)
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
