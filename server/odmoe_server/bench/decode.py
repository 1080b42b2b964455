"""`odmoe bench decode`: every variant and the resident run in turn, on one checkpoint and the same cores.

Starts and times; what the figures mean is decided in `rows`.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
from rich.console import Console

from odmoe_model.manifest import Manifest, read_manifest
from odmoe_server import progress
from odmoe_server.bench import pinning, variants
from odmoe_server.bench.cluster import BenchError, Running, running
from odmoe_server.bench.pinning import Cores
from odmoe_server.bench.prompts import Prompt, Prompts
from odmoe_server.bench.reading import Reading, decoding
from odmoe_server.bench.resident import IMPLEMENTATIONS, Found, Job, Measured
from odmoe_server.bench.rows import DeviceBytes, Reference, Row, Run, cache_bytes, resident_row, row_of
from odmoe_server.bench.shadow_time import shadow_layer_s
from odmoe_server.bench.variants import Variant
from odmoe_server.config import ServeSettings
from odmoe_server.launch_plan import environment
from odmoe_server.models import Progress

RESIDENT_S: Final = 1800.0
_SHADOW_HOLDS: Final = re.compile(r"the shadow holds ([\d.]+) MB")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be measured. `repeats` prompts of each length are asked. `with_parts`: also what messages take, and
    the shadow by itself."""

    store: Path
    variants: list[Variant]
    link_ratios: Sequence[float]
    nodes: int
    group_size: int
    tokens: int
    prompt_tokens: int
    first_prompt_tokens: int
    repeats: int
    with_parts: bool = True


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All of it; `before` and `after` are the resident run's. `without_loads` are no rows: they tell `odmoe plan` what
    messages take."""

    question: Question
    manifest: Manifest
    cores: Cores
    before: Found
    after: Found
    fastest: str
    layer_s: float
    shadow_layer_s: float | None
    runs: list[Run]
    without_loads: list[Run] = field(default_factory=list)

    @property
    def reference(self) -> Reference:
        """The fastest of transformers' implementations, before and after taken together."""
        found = [_of(self.before, self.fastest), _of(self.after, self.fastest)]
        first_s = [median(m.first_s) for m in self.before.measured if m.first_s]
        tokens = self.question.first_prompt_tokens + self.question.tokens
        return Reference(
            tokens_per_s=median([speed for one in found for speed in one.tokens_per_s]),
            first_s=min(first_s),
            device_bytes=self.before.weight_bytes + cache_bytes(self.manifest, tokens=tokens),
        )

    @property
    def expected(self) -> list[list[int]]:
        """The answers of eager experts, the reference of exactness."""
        return [answer.tokens for answer in _of(self.before, "eager").answers]

    @property
    def drift(self) -> float:
        """How much faster the machine was at the end, as a fraction."""
        before, after = (median(_of(found, self.fastest).tokens_per_s) for found in (self.before, self.after))
        return after / before - 1

    @property
    def rows(self) -> list[Row]:
        """The resident run first, then the variants in the order they ran."""
        speeds = [s for found in (self.before, self.after) for s in _of(found, self.fastest).tokens_per_s]
        first = resident_row(
            implementation=self.fastest, speeds=speeds, reference=self.reference, tokens=self.question.tokens
        )
        return [first, *(row_of(run, self.reference) for run in self.runs)]


def measure(question: Question, *, console: Console) -> Findings:
    """Everything, in order. Raises ValueError with a message for the user."""
    from odmoe_model.skeleton import load_tokenizer
    from odmoe_model.store import ExpertStore

    cores = pinning.choose(pinning.available())
    console.print(cores.words, highlight=False)
    pinning.stay_on(cores.beside)
    manifest = read_manifest(question.store)
    bench = _Bench(question, manifest, cores, Prompts(load_tokenizer(ExpertStore.open(question.store, verify=False))))
    with progress.shown(console) as tell:
        return bench.measure(tell, console)


class _Bench:
    def __init__(self, question: Question, manifest: Manifest, cores: Cores, maker: Prompts) -> None:
        self._question, self._manifest, self._cores, self._maker = question, manifest, cores, maker
        self._prompts = [maker.make(question.prompt_tokens, number=i) for i in range(question.repeats)]
        self._first = [maker.make(question.first_prompt_tokens, number=i) for i in range(question.repeats)]
        self._warm = maker.make(question.prompt_tokens, number=question.repeats)
        self._expected: list[str] = []
        self._shadow_bytes: int | None = None
        self._layer_s = 0.0

    def measure(self, tell: Progress, console: Console) -> Findings:
        question = self._question
        free = variants.named(variants.WITHOUT_LOADS if question.with_parts else ())
        asked = [(variant, ratio) for ratio in question.link_ratios for variant in question.variants]
        say = _Narrator(tell, steps=2 + len(asked) + len(free))
        say.next("plain transformers, everything in memory")
        before = self._resident(IMPLEMENTATIONS)
        self._expected = [self._maker.text(answer.tokens) for answer in _of(before, "eager").answers]
        fastest = max((m for m in before.measured if m.answers), key=lambda m: median(m.tokens_per_s))
        self._layer_s = 1 / median(fastest.tokens_per_s) / self._manifest.num_moe_layers
        runs = []
        for variant, link_ratio in asked:
            say.next(f"{variant.name}, link ratio {link_ratio:g}")
            runs.append(self._run(variant, link_ratio, say.detail))
            speed = median(reading.between_tokens / reading.between_s for reading in runs[-1].decoded)
            console.print(f"{say.what}: {speed:.3f} tokens/s; resident {median(fastest.tokens_per_s):.3f}")
        without_loads, shadow_s = self._without_loads(free, say)
        say.next("plain transformers again")
        return Findings(
            question=question,
            manifest=self._manifest,
            cores=self._cores,
            before=before,
            after=self._resident([fastest.implementation]),
            fastest=fastest.implementation,
            layer_s=self._layer_s,
            shadow_layer_s=shadow_s,
            runs=runs,
            without_loads=without_loads,
        )

    def _without_loads(self, chosen: Sequence[Variant], say: "_Narrator") -> tuple[list[Run], float | None]:
        """What is left when loads take next to nothing, and what a layer of the shadow takes. Forecasts are drawn
        meanwhile, which costs the server a few stamps a layer."""
        runs, shadow_s = [], None
        for variant in chosen:
            say.next(f"{variant.name} without loads")
            with tempfile.TemporaryDirectory(prefix="odmoe-bench-") as scratch:
                file = Path(scratch) / "timeline.json"
                runs.append(self._run(variant, variants.NEXT_TO_NOTHING, say.detail, timeline=file))
                shadow_s = shadow_s or shadow_layer_s(file.read_text(encoding="utf-8"))
        return runs, shadow_s

    def _resident(self, implementations: Sequence[str]) -> Found:
        job = Job(
            store=str(self._question.store),
            prompts=[prompt.token_ids for prompt in self._prompts],
            first_prompts=[prompt.token_ids for prompt in self._first],
            tokens=self._question.tokens,
            implementations=list(implementations),
        )
        command = pinning.pinned([sys.executable, "-m", "odmoe_server.bench.resident"], self._cores.main)
        try:
            done = subprocess.run(
                command,
                input=msgspec.json.encode(job),
                capture_output=True,
                env=environment(1),
                timeout=RESIDENT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"the resident run did not end within {RESIDENT_S:.0f} s") from error
        if done.returncode != 0:
            raise BenchError(f"the resident run failed: {done.stderr.decode(errors='replace').strip()}")
        return msgspec.json.decode(done.stdout, type=Found)

    def _run(
        self, variant: Variant, link_ratio: float, tell: Callable[[str], None], *, timeline: Path | None = None
    ) -> Run:
        record_bytes = self._manifest.record_bytes
        speed = variants.link_gbps(record_bytes=record_bytes, link_ratio=link_ratio, layer_s=self._layer_s)
        slots = self._slots(variant)
        settings = self._settings(variant, link_gbps=speed, slots=slots, timeline=timeline)
        with running(settings, store=self._question.store, cores=self._cores, tell=tell) as roles:
            roles.ask(self._warm.content, tokens=2)
            tell("first tokens")
            first_s = [self._first_s(roles, prompt) for prompt in self._first]
            tell("decoding")
            asked = [self._decoded(roles, i) for i in range(len(self._prompts))]
            return Run(
                variant=variant.name,
                link_ratio=link_ratio,
                link_gbps=speed,
                slots=slots,
                decoded=[reading for reading, _ in asked],
                first_s=first_s,
                identical=all(same for _, same in asked),
                device=self._device(roles, asked[-1][0]),
                runs_ahead=variant.settings.get("run_ahead", 0) > 0,
            )

    def _settings(self, variant: Variant, *, link_gbps: float, slots: int, timeline: Path | None) -> ServeSettings:
        common = {
            "model": str(self._question.store),
            "served_model_names": ("bench",),
            "nodes": self._question.nodes,
            "group_size": self._question.group_size,
            "slots": slots,
            "node_device": "emulated",
            "link_gbps": link_gbps,
            "threads": 1,
            "drain_s": 0,
            "timeline": timeline,
        }
        return ServeSettings(**{**common, **variant.settings})

    def _slots(self, variant: Variant) -> int:
        if not variant.same_bytes:
            return 1
        if self._shadow_bytes is None:
            raise BenchError(f"{variant.name} gets the shadow's bytes: measure it after a variant with a shadow")
        return variants.lru_slots(
            nodes=self._question.nodes, record_bytes=self._manifest.record_bytes, shadow_bytes=self._shadow_bytes
        )

    def _first_s(self, roles: Running, prompt: Prompt) -> float:
        before = roles.settled()
        roles.ask(prompt.content, tokens=1)
        return roles.settled().since(before).first_s

    def _decoded(self, roles: Running, number: int) -> tuple[Reading, bool]:
        prompt, tokens = self._prompts[number], self._question.tokens
        before = roles.settled()
        roles.ask(prompt.content, tokens=1)
        between = roles.settled()
        answer = roles.ask(prompt.content, tokens=tokens)
        after = roles.settled()
        same = (answer.prompt_tokens, answer.completion_tokens) == (len(prompt.token_ids), tokens)
        same = same and answer.text == self._expected[number]
        return decoding(after.since(between), prompt_only=between.since(before)), same

    def _device(self, roles: Running, last: Reading) -> DeviceBytes:
        tokens = self._question.first_prompt_tokens + self._question.tokens
        predictor = shadow_bytes(roles.line("predictor", "the shadow holds"))
        if predictor:
            self._shadow_bytes = predictor
        return DeviceBytes(
            server=self._manifest.non_expert.bytes + cache_bytes(self._manifest, tokens=tokens),
            nodes=tuple(int(size) for size in last.slot_bytes),
            predictor=predictor,
        )


class _Narrator:
    """Tells what is being done, and the share of the steps that are behind."""

    def __init__(self, tell: Progress, *, steps: int) -> None:
        self._tell, self._steps, self._begun = tell, steps, 0
        self.what = ""

    def next(self, what: str) -> None:
        self.what = what
        self._begun += 1
        self._tell(what, (self._begun - 1) / self._steps)

    def detail(self, text: str) -> None:
        self._tell(f"{self.what}: {text}", (self._begun - 1) / self._steps)


def shadow_bytes(line: str | None) -> int:
    """What the predictor says its weights hold, in bytes; 0 where there is none. Its caches are left out, which are
    as large as the server's."""
    found = _SHADOW_HOLDS.search(line or "")
    return round(float(found[1]) * 1e6) if found else 0


def _of(found: Found, implementation: str) -> Measured:
    return next(measured for measured in found.measured if measured.implementation == implementation)
