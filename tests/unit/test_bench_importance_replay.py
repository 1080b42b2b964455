"""A tiny model through many devices at once: the lanes of the reference, of arms that replace, and what they cost."""

from collections import OrderedDict

import pytest
import torch

from odmoe_model.store import ExpertStore
from odmoe_server.bench.importance import passages, replay
from odmoe_server.bench.importance.arms import ABLATION, IMPORTANCE, LRU
from odmoe_server.bench.importance.device import Times
from odmoe_server.bench.importance.fleet import Arm, Fleet
from odmoe_server.bench.importance.lanes import Gated, LaneModel, as_gated
from support.stores import tiny_store

TIMES = Times(main_s=1.0, expert_s=0.5, load_s=2.0, host_s=3.0)
LAYERS, EXPERTS, TEXTS, PROMPT, TOKENS = 3, 8, 3, 4, 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("tiny"), eos_token_id=2), verify=False)


def a_fleet(model: LaneModel, *arms: Arm) -> Fleet:
    return Fleet(
        arms, num_texts=TEXTS, num_layers=LAYERS, num_experts=EXPERTS, times=TIMES, normalised=model.normalised
    )


def an_arm(policy: str, *, batch: int, alpha: float, share: float) -> Arm:
    return Arm(policy=policy, slots_share=share, batch=batch, alpha=alpha, features=ABLATION[policy])


def some_text() -> torch.Tensor:
    return torch.randint(3, 120, (TEXTS, PROMPT + TOKENS + 1), generator=torch.Generator().manual_seed(1))


def test_an_lru_device_hits_what_a_plain_cache_hits(store: ExpertStore) -> None:
    model, text_SP = LaneModel(store), some_text()
    arm = an_arm(LRU, batch=1, alpha=0.0, share=0.25)
    fleet = a_fleet(model, arm)

    passages.read(model, fleet, [text_SP], prompt_tokens=PROMPT)

    hits = needed = 0
    for tokens_P in text_SP:
        routed = _routed(model, tokens_P[:-1])
        cache: OrderedDict[tuple[int, int], None] = OrderedDict()
        for step, experts in enumerate(routed):
            for layer, chosen in enumerate(experts):
                keys = [(layer, expert) for expert in chosen]
                if step:  # the prompt is the first
                    hits += sum(key in cache for key in keys)
                    needed += len(keys)
                for key in keys:
                    cache[key] = None
                    cache.move_to_end(key)
                while len(cache) > 6:
                    cache.popitem(last=False)
    counts = fleet.counts()[arm]
    assert (counts.needed, counts.steps) == (needed, TEXTS * TOKENS)
    assert counts.hits == pytest.approx(hits, abs=2)  # a prompt's own experts come in another order
    assert 0 < counts.hits < counts.needed


def _routed(model: LaneModel, tokens_P: torch.Tensor) -> list[list[list[int]]]:
    """For the prompt and for each step the experts of each layer, the better scored first."""
    found: list[list[list[int]]] = []

    def hear(gated: Gated) -> tuple[torch.Tensor, torch.Tensor]:
        if gated.layer == 0:
            found.append([])
        found[-1].append(list(dict.fromkeys(gated.index_TK.flatten().tolist())))
        return as_gated(gated)

    model.decide = hear
    cache = model.prompt(tokens_P[None, :PROMPT])
    for token in tokens_P[PROMPT:]:
        model.step(token[None], cache)
    model.decide = as_gated
    return found


def test_no_alpha_to_speak_of_changes_nothing_and_a_large_one_saves_loads(store: ExpertStore) -> None:
    model = LaneModel(store)
    lru = an_arm(LRU, batch=3, alpha=0.0, share=0.3)
    hardly, much = (an_arm("substitution", batch=3, alpha=alpha, share=0.3) for alpha in (1e-9, 0.9))
    fleet = a_fleet(model, lru, hardly, much)
    assert fleet.num_lanes == 3 * TEXTS

    heard = passages.read(model, fleet, [some_text(), some_text() + 1], prompt_tokens=PROMPT)

    counts = fleet.counts()
    assert counts[hardly].replaced == 0 < counts[much].replaced
    assert counts[much].loads < counts[hardly].loads
    reference, same, other = (
        [loss for lane in fleet.lanes_of[arm] for loss in heard.losses[lane]] for arm in (lru, hardly, much)
    )
    assert same == pytest.approx(reference)
    assert other != pytest.approx(reference)
    assert heard.agreed[0] == len(heard.losses[0]) == 2 * TOKENS


def test_one_model_from_job_to_rows(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "load_tokenizer", lambda store: _Words())
    job = replay.Job(
        store=str(store.path), name="tiny", speaks=True, tokens=6, texts=3, questions=0, quick=True, load_ratio=4.4,
        host_ratio=1.2,
    )  # fmt: skip
    said: list[str] = []

    found = replay.run(job, tell=said.append)

    assert said[-1] == "tiny: reading, 100 %"
    assert {row.policy for row in found.rows} >= {LRU, IMPORTANCE, "importance-learned"}
    for row in found.rows:
        assert 0 <= row.hit_rate <= 1
        assert row.tpot_computed_vs_lru is not None
        assert row.tpot_ms is None
        assert row.perplexity is not None
        if row.alpha == 0:
            assert (row.substituted, row.perplexity_vs_gated, row.agreement) == (0, 0, 1)


class _Words:
    """A tokenizer of a kind: a token for each byte, within the tiny vocabulary."""

    vocab_size = 128

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + byte % 120 for byte in text.encode()]}


def test_an_arm_as_coded_replaces_by_the_codes_rule(store: ExpertStore) -> None:
    """Two arms that differ in nothing else would have the same counts."""
    model, text_SP = LaneModel(store), some_text()
    paper = an_arm("substitution", batch=1, alpha=0.9, share=0.5)
    coded = Arm(policy="code", slots_share=0.5, batch=1, alpha=0.9, features=ABLATION["substitution"], as_coded=True)
    fleet = a_fleet(model, paper, coded)

    passages.read(model, fleet, [text_SP], prompt_tokens=PROMPT)

    counts = fleet.counts()
    assert counts[coded].replaced > 0
    assert counts[coded] != counts[paper]
