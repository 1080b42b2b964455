"""Importance mode as it is served: all roles as processes on emulated links, timed, beside LRU with the same slots.

Knows the settings that make each policy; what is compared and told of it is decided in `rows` and `record`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from odmoe_model.manifest import Manifest, read_manifest
from odmoe_server.bench.cluster import ANSWER_S, BenchError, Running, running
from odmoe_server.bench.importance.arms import GOAL_ALPHA, GOAL_SHARE, IMPORTANCE, LRU, SERVED_ALPHAS
from odmoe_server.bench.importance.questions import QUESTIONS
from odmoe_server.bench.importance.rows import SERVED, Row, compare
from odmoe_server.bench.pinning import Cores
from odmoe_server.bench.reading import Reading, decoding
from odmoe_server.bench.variants import link_gbps
from odmoe_server.config import ServeSettings

NODES: Final = 2
BATCHES: Final = (1, 3)
NAME: Final = "bench"
_NO_CORES: Final = Cores(main=None, beside=None)
_COMMON: Final[dict[str, Any]] = {"predictor": False, "mode": IMPORTANCE, "prefetch": "gate"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to start the server, and what is asked of it: (policy, alpha) by alpha of the request."""

    settings: Mapping[str, Any]
    asked: Sequence[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a server did for a batch of prompts, without the prompts' own part, and the answers."""

    decoded: Reading
    first_s: float
    answers: list["Answered"]

    @property
    def tpot_ms(self) -> float:
        """Mean time between two tokens of a sequence."""
        return 1e3 * self.decoded.between_s / self.decoded.between_tokens

    @property
    def texts(self) -> list[str]:
        """Of the answers."""
        return [answer.text for answer in self.answers]

    @property
    def substituted(self) -> float:
        """Share of the experts that tokens needed, of all requests, for which others stood in."""
        return sum(one.substituted for one in self.answers) / sum(one.activations for one in self.answers)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One request's text, and what its `expert_stats` say."""

    text: str
    activations: int
    substituted: int


def setups(*, quick: bool) -> list[Setup]:
    """The cumulative ablation at the goal's alpha, and the whole at several; with `quick` the whole at the goal's."""
    alphas = (0.0, *((GOAL_ALPHA,) if quick else SERVED_ALPHAS))
    whole = Setup(settings={**_COMMON, "cpu_share": True}, asked=[(IMPORTANCE, alpha) for alpha in alphas])
    lru = Setup(settings={"predictor": False, "slot_mode": "lru"}, asked=[(LRU, 0.0)])
    if quick:
        return [lru, whole]
    return [
        lru,
        Setup(settings={**_COMMON, "prefetch": "off"}, asked=[("eviction", 0.0), ("substitution", GOAL_ALPHA)]),
        Setup(settings=_COMMON, asked=[("prefetch", GOAL_ALPHA)]),
        whole,
    ]


def serve_and_time(
    store: Path, name: str, *, layer_s: float, load_ratio: float, quick: bool, tell: Callable[[str], None]
) -> tuple[list[Row], dict[str, object]]:
    """All setups in turn; rows, and facts for the record. Raises BenchError."""
    manifest = read_manifest(store)
    speed = link_gbps(record_bytes=manifest.record_bytes, link_ratio=load_ratio, layer_s=layer_s)
    slots = max(1, round(GOAL_SHARE * manifest.num_moe_layers * manifest.num_experts / NODES))
    tokens = 16 if quick else 32
    rows: list[Row] = []
    answers: dict[tuple[str, float, int], list[str]] = {}
    for setup in setups(quick=quick):
        settings = _settings(store, setup.settings, link_gbps=speed, slots=slots)
        with running(settings, store=store, cores=_NO_CORES, tell=lambda text: None) as roles:
            warm(roles)
            for policy, alpha in setup.asked:
                for batch in BATCHES:
                    tell(f"serving {name}: {policy}, alpha {alpha:g}, batch {batch}")
                    asked = None if policy == LRU else alpha
                    timed = time_batch(roles, batch=batch, tokens=tokens, alpha=asked)
                    answers[policy, alpha, batch] = timed.texts
                    rows.append(_row(name, policy, alpha, batch, timed, manifest, slots=NODES * slots))
    compare(rows)
    return rows, _facts(name, layer_s, load_ratio, tokens, answers)


def warm(roles: Running) -> None:
    """Whatever happens once only."""
    ask(roles, [QUESTIONS[-1].text], tokens=2, alpha=None)


def time_batch(roles: Running, *, batch: int, tokens: int, alpha: float | None) -> Timed:
    """So many questions at once, of so many tokens each; first once for the prompts alone."""
    prompts = [question.text for question in QUESTIONS[:: len(QUESTIONS) // batch][:batch]]
    before = roles.settled()
    ask(roles, prompts, tokens=1, alpha=alpha)
    between = roles.settled()
    answers = ask(roles, prompts, tokens=tokens, alpha=alpha)
    after = roles.settled()
    whole = after.since(between)
    return Timed(
        decoded=decoding(whole, prompt_only=between.since(before)),
        first_s=whole.first_s / whole.first_tokens,
        answers=answers,
    )


def ask(roles: Running, prompts: Sequence[str], *, tokens: int, alpha: float | None) -> list[Answered]:
    """Greedy answers of so many tokens to all prompts at once. Raises BenchError."""
    with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
        return list(pool.map(lambda prompt: _answer(roles, prompt, tokens=tokens, alpha=alpha), prompts))


def _answer(roles: Running, prompt: str, *, tokens: int, alpha: float | None) -> Answered:
    body: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "return_expert_stats": True,
    }
    if alpha is not None:
        body["expert_substitution"] = alpha
    try:
        response = roles.client.post("/v1/chat/completions", json=body, timeout=ANSWER_S)
    except httpx.HTTPError as error:
        raise BenchError(f"the server did not answer: {error!r}") from error
    if response.status_code != httpx.codes.OK:
        raise BenchError(f"the server refused: {response.text}")
    answer = response.json()
    stats = answer["expert_stats"]
    return Answered(
        text=str(answer["choices"][0]["message"]["content"]),
        activations=int(stats["activations"]),
        substituted=int(stats["substituted"]),
    )


def _settings(store: Path, more: Mapping[str, Any], *, link_gbps: float, slots: int) -> ServeSettings:
    return ServeSettings(
        model=str(store),
        served_model_names=(NAME,),
        nodes=NODES,
        slots=slots,
        node_device="emulated",
        link_gbps=link_gbps,
        threads=1,
        drain_s=0,
        prefix_cache=False,
        **more,
    )


def _row(name: str, policy: str, alpha: float, batch: int, timed: Timed, manifest: Manifest, *, slots: int) -> Row:
    did = timed.decoded
    return Row(
        model=name,
        how=SERVED,
        policy=policy,
        slots_share=GOAL_SHARE,
        slots=slots,
        batch=batch,
        alpha=alpha,
        hit_rate=did.hit / did.activations,
        substituted=timed.substituted,
        bytes_per_token=did.loads * manifest.record_bytes / did.between_tokens,
        tpot_ms=timed.tpot_ms,
        ttft_ms=1e3 * timed.first_s,
    )


def _facts(
    name: str,
    layer_s: float,
    load_ratio: float,
    tokens: int,
    answers: Mapping[tuple[str, float, int], Sequence[str]],
) -> dict[str, object]:
    exact = all(texts == answers[LRU, 0.0, batch] for (_, alpha, batch), texts in answers.items() if alpha == 0)
    return {
        "model": name,
        "layer_s": layer_s,
        "tokens": tokens,
        "nodes": NODES,
        "exact_at_alpha_0": exact,
        "notes": [
            f"{SERVED}: {name}, server and {NODES} nodes as processes on this machine, nothing pinned; on each "
            f"node's emulated link a load takes {load_ratio:g} times a layer's {1e3 * layer_s:.2f} ms; {tokens} tokens "
            f"of each answer; at alpha 0 they were {'those' if exact else 'NOT those'} of LRU, character for character",
        ],
    }
