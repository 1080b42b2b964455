"""The planner's machines, worked out by hand: one shared core, loads broken off, nodes of unlike speed, prompts."""

from dataclasses import replace

import pytest

from odmoe_server.planner.answer import Question, answer, first_token_s
from odmoe_server.planner.forecasts import Forecast
from odmoe_server.planner.machines import Crew, Device, Machines, Network, Node, Times, members
from odmoe_server.planner.prefill import pass_through
from odmoe_server.planner.rig import Job, Lane, Rig
from odmoe_server.planner.shape import named
from odmoe_server.planner.simulate import Decoded, deal, decode

EARLY = Forecast(align_token=0, align_kv=0)
LAYERS = 24


def crew(nodes: int, *, group_size: int = 2, slots: int = 1, shared_core: bool = True) -> Crew:
    return Crew(nodes=(Node(slots=slots, link_gb_per_s=1.0),) * nodes, group_size=group_size, shared_core=shared_core)


def steps(nodes: int, *, main_s: float = 1.0, expert_s: float = 4.5, load_s: float = 44.0, row_s: float = 0.0) -> Times:
    return Times(
        main_s=main_s,
        expert_s=expert_s,
        shadow_s=0.0,
        load_s=(load_s,) * nodes,
        row_s=row_s,
        kv_s=0.0,
        latency_s=0.0,
    )


def run(rig: Crew, times: Times, forecast: Forecast, *, tokens: int = 6) -> Decoded:
    return decode(rig, times, forecast, layers=LAYERS, num_experts=8, top_k=2, tokens=tokens)


def layer_s(decoded: Decoded) -> float:
    """A layer of the last token, when the first ones have filled the pipeline."""
    return (decoded.ends_s[-1] - decoded.ends_s[-2]) / LAYERS


# ------------------------------------------------------------------------------------------- a core that all share


def test_experts_of_a_layer_follow_one_another_on_a_shared_core() -> None:
    free = steps(8, load_s=0.0)
    assert layer_s(run(crew(8), free, EARLY)) == pytest.approx(1 + 2 * 4.5)
    assert layer_s(run(crew(8, shared_core=False), free, EARLY)) == pytest.approx(1 + 4.5)


def test_messages_take_their_time_of_a_shared_core() -> None:
    """Two rows out, two results back; none of them beside an expert."""
    assert layer_s(run(crew(8), steps(8, load_s=0.0, row_s=0.3), EARLY)) == pytest.approx(1 + 2 * 4.5 + 4 * 0.3)


def test_the_bound_at_the_papers_link_ratio() -> None:
    """Layers of 10, loads of 44, four groups. The node whose expert is computed first loads its next one first, is
    ready first, and is computed first again: its turn of four layers takes a load and one expert, not two. So a layer
    takes (44 + 4.5) / 4 and the speed is 0.825 of the resident one."""
    decoded = run(crew(8), steps(8), EARLY)
    assert layer_s(decoded) == pytest.approx((44 + 4.5) / 4)
    assert (1 + 2 * 4.5) / layer_s(decoded) == pytest.approx(0.825, abs=0.001)


@pytest.mark.parametrize(("load_s", "share"), [(44.0, 0.879), (30.0, 1.0)])
def test_what_computing_on_arrival_adds(load_s: float, share: float) -> None:
    """The same, but two thirds of an expert are computed while its last third is on the link, so that a turn of four
    layers takes a load and a third of an expert."""
    decoded = run(crew(8), replace(steps(8, load_s=load_s), first_stage=2 / 3), EARLY)
    assert layer_s(decoded) == pytest.approx(max(10.0, (load_s + 4.5 / 3) / 4))
    assert 10.0 / layer_s(decoded) == pytest.approx(share, abs=0.001)


def test_after_routing_a_first_stage_hides_in_the_load() -> None:
    """Alone on its core, a node whose load takes 12 computes 2 of its 3 by the end of it, and has waited for the other
    10."""
    times = replace(steps(1, expert_s=3.0, load_s=12.0), first_stage=2 / 3)
    rig = Rig(crew(1, group_size=1, shared_core=False), times.load_s)
    job = Job(0.0, right=False)
    rig.announce(0, job)
    rig.lanes[0].queue[0].known_s = float("inf")
    rig.layer({0: [job]}, times)
    assert rig.clock_s == pytest.approx(1.0 + 12.0 + 1.0)
    assert rig.stalled_s == pytest.approx(10.0)


@pytest.mark.parametrize("slots", [1, 2])
def test_loads_are_hidden_on_a_shared_core_up_to_the_bound_that_is_shown(slots: int) -> None:
    shape = named("mixtral-8x7b", weight_bits=8)
    rig = Machines(
        nodes=(Node(slots=slots, link_gb_per_s=1.0),) * 8,
        group_size=2,
        shared_core=True,
        device=Device(memory_gb_per_s=1, tflops=1, overhead_s=0),
        network=Network(latency_s=0, gbit_per_s=1e9, overhead_s=0.2e-3),
        shadow_bits=8,
        main_s=1e-3,
        expert_s=4.5e-3,
        shadow_s=0.0,
    )
    question = Question(
        shape=shape, machines=rig, forecast=EARLY, prompt_tokens=1, output_tokens=3, prefill_overlap=False, seed=0
    )
    bound_s = answer(question).hidden_load_s
    assert bound_s == pytest.approx(4 * 10.8e-3 - (4.5e-3 if slots == 1 else 0))
    timed = replace(steps(8), main_s=1e-3, expert_s=4.5e-3, row_s=0.2e-3)
    nodes = crew(8, slots=slots)
    at, beyond = (run(nodes, replace(timed, load_s=(bound_s * by,) * 8), EARLY) for by in (0.999, 1.02))
    assert layer_s(at) == pytest.approx(10.8e-3)
    assert layer_s(beyond) > 10.8e-3 * 1.001


def test_what_is_ready_goes_first() -> None:
    """Node 0's load takes longer, so node 1's expert is computed under it."""
    rig, times = Rig(crew(2), (10.0, 2.0)), replace(steps(2), load_s=(10.0, 2.0))
    dealt = {node: [Job(0.0)] for node in (0, 1)}
    for node, jobs in dealt.items():
        rig.announce(node, jobs[0])
    rig.layer(dealt, times)
    assert rig.clock_s == pytest.approx(10 + 4.5)
    assert rig.stalled_s == pytest.approx(10 - 1)


# ----------------------------------------------------------------------------------------------------- breaking off


def lane(*jobs: Job, slots: int = 1) -> Lane:
    node = Lane(10.0, [0.0] * slots)
    node.queue.extend(jobs)
    return node


def test_a_wrong_load_on_its_way_is_broken_off() -> None:
    wrong = Job(0.0, right=False)
    node = lane(wrong)
    node.gate([wrong], 4.0)
    assert node.fetch(wrong, 4.0) == 4 + 10
    assert (node.loads, node.reloads, node.broken_off) == (2, 1, 1)


def test_a_right_load_on_its_way_is_waited_for() -> None:
    right = Job(0.0)
    node = lane(right)
    node.gate([right], 4.0)
    assert node.fetch(right, 4.0) == 10
    assert (node.loads, node.reloads, node.broken_off) == (1, 0, 0)


@pytest.mark.parametrize(("asked_s", "ready_s", "later_s"), [(14.0, 24.0, 34.0), (18.0, 30.0, 20.0)])
def test_a_later_layers_load_gives_way_unless_it_is_nearly_done(asked_s: float, ready_s: float, later_s: float) -> None:
    """The second load runs from 10 to 20: with 6 to go it gives way and is begun again; with 2, it is waited for."""
    wrong, later = Job(0.0, right=False), Job(0.0)
    node = lane(wrong, later, slots=2)
    node.gate([wrong], asked_s)
    assert node.fetch(wrong, asked_s) == ready_s
    node.gate([later], 100.0)
    assert node.fetch(later, 100.0) == 100.0
    assert later.ready_s == later_s


# ------------------------------------------------------------------------------------------------------ unlike nodes


def unlike(*gb_per_s: float) -> Crew:
    return Crew(nodes=tuple(Node(slots=1, link_gb_per_s=each) for each in gb_per_s), group_size=2)


def test_placement_is_told_how_fast_nodes_load() -> None:
    assert [member.load_us for member in members(unlike(25.0, 12.5))] == [40_000, 80_000]


def test_fast_groups_get_more_layers() -> None:
    """Loads of 10 and 30: of 24 layers, three in four go to the fast group of two, so that both load all the time.
    Dealt evenly, the slow group would need 12 turns of 31."""
    rig = unlike(3.0, 1.0, 3.0, 1.0)
    dealt = deal(rig, layers=LAYERS, top_k=2)
    assert sum(nodes == [0, 2] for nodes in dealt) == 18
    assert sum(nodes == [1, 3] for nodes in dealt) == 6
    times = replace(steps(4, main_s=0.1, expert_s=1.0), load_s=(10.0, 30.0, 10.0, 30.0))
    token_s = LAYERS * layer_s(run(rig, times, EARLY))
    assert 18 * 11 * 0.999 <= token_s < 0.75 * 12 * 31


# ---------------------------------------------------------------------------------------------------------- prompts


def test_a_prompts_next_load_begins_when_the_slot_is_free() -> None:
    """Four nodes of two experts a layer each, one core. A node turns round in a load and an expert; the last of four
    waits for the three before it."""
    rig = Rig(crew(4), (20.0,) * 4)
    pass_through(rig, steps(4, main_s=4.0, expert_s=2.0, load_s=20.0), crew(4), layers=5, active=8)
    assert rig.clock_s == pytest.approx(5 * 2 * 22 + 3 * 2)


def test_a_prompt_is_bound_by_computing_where_links_are_fast() -> None:
    rig = Rig(crew(4), (0.0,) * 4)
    pass_through(rig, steps(4, main_s=4.0, expert_s=2.0, load_s=0.0), crew(4), layers=5, active=8)
    assert rig.clock_s == pytest.approx(5 * (4 + 8 * 2))


def test_fast_nodes_get_more_of_a_prompt() -> None:
    """Loads of 10 and 30: of 8 experts, the fast node takes six, and both end together; without loads ahead of time."""
    even, uneven = (Rig(nodes, load_s) for nodes, load_s in [(crew(2), (15.0, 15.0)), (unlike(3.0, 1.0), (10.0, 30.0))])
    times = steps(2, main_s=0.0, expert_s=0.0)
    pass_through(even, times, crew(2), layers=4, active=8)
    pass_through(uneven, times, unlike(3.0, 1.0), layers=4, active=8)
    assert even.clock_s == uneven.clock_s == pytest.approx(4 * 60)


def test_chunks_pass_one_after_the_other() -> None:
    def first_s(prompt_tokens: int, chunk: int | None) -> float:
        machines = Machines(
            nodes=(Node(slots=1, link_gb_per_s=1.0),) * 8,
            group_size=2,
            device=Device(memory_gb_per_s=1000, tflops=0.5, overhead_s=0),
            network=Network(latency_s=0, gbit_per_s=100),
            shadow_bits=8,
        )
        return first_token_s(
            Question(
                shape=named("mixtral-8x7b", weight_bits=8),
                machines=machines,
                forecast=EARLY,
                prompt_tokens=prompt_tokens,
                output_tokens=1,
                prefill_overlap=True,
                seed=0,
                prefill_chunk=chunk,
            )
        )

    assert first_s(256, 256) == first_s(256, None)
    # The experts are loaded for each chunk, but the second one's first loads begin under the end of the first.
    assert first_s(256, None) < first_s(256, 128) < 2 * first_s(128, None)
