"""What `odmoe plan` is asked: its settings, and the shape, machines and forecasts they stand for."""

from pathlib import Path
from typing import Final, Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from odmoe_server.planner import shape
from odmoe_server.planner.forecasts import Forecast
from odmoe_server.planner.machines import Device, Machines, Network, Node
from odmoe_server.planner.shape import Shape
from odmoe_wire.settings import RoleSettings

# Options that say nothing where the option after them has another value.
_ONLY_WITH: Final = {
    "recall": ("predictor", "shadow"),
    "align_token": ("predictor", "shadow"),
    "align_kv": ("predictor", "shadow"),
    "run_ahead": ("predictor", "shadow"),
    "draft": ("predictor", "shadow"),
    "shadow_bits": ("predictor", "shadow"),
    "shadow_ms": ("predictor", "shadow"),
    "prompt_kv": ("predictor", "shadow"),
}
# Options that ask for a comparison, each of which takes nothing else.
_COMPARISONS: Final = ("paper", "bench")


class PlanSettings(RoleSettings):
    """Predict speed, memory and what bounds them, from a model's shape and a description of the machines.

    The defaults are the OD-MoE paper's testbed; --paper compares the model with what the paper printed, --bench with
    what was measured on a machine.
    """

    model_config = SettingsConfigDict(env_prefix="ODMOE_PLAN_")

    paper: bool = Field(default=False, description="compare with the paper's figures; status 1 if one is off by > 10 %")
    bench: Path | None = Field(
        default=None,
        description="compare with a JSON record of odmoe bench decode; status 1 if a speed is off by > 20 %",
    )
    model: Path | None = Field(default=None, description="a prepared store, whose shape is taken")
    shape: str = Field(default="mixtral-8x7b", description=f"a published shape: {', '.join(shape.NAMES)}")
    weight_bits: int = Field(default=16, ge=1, le=32, description="width of a published shape's weights")

    nodes: int = Field(default=8, ge=1, description="node agents")
    group_size: int | None = Field(
        default=None,
        ge=1,
        description="nodes that serve a layer; unless set as many as the model's top-k, with --draft as many as a step"
        " may need experts",
    )
    slots: tuple[int, ...] = Field(default=(1,), description="experts a node has room for: one number, or one a node")
    link_gb_per_s: tuple[float, ...] = Field(
        default=(25.0,), description="host to device, GB/s: one number, or one a node"
    )
    network_gbit_per_s: float = Field(default=1.0, gt=0, description="each machine's network link, Gbit/s")
    network_latency_ms: float = Field(default=0.1, ge=0, description="what a message takes besides its bytes")
    message_ms: float = Field(default=0.0, ge=0, description="what a message takes of the server's own time")
    shared_core: bool = Field(default=False, description="one core computes for the server and all nodes")
    memory_gb_per_s: float = Field(default=936.0, gt=0, description="device memory bandwidth, GB/s")
    tflops: float = Field(default=35.6, gt=0, description="device arithmetic, 10^12 operations a second")
    overhead_ms: float = Field(default=0.28, ge=0, description="what each step takes besides reading its weights")
    main_ms: float | None = Field(default=None, ge=0, description="measured: the main node's part of a layer")
    expert_ms: float | None = Field(default=None, ge=0, description="measured: one expert")
    shadow_ms: float | None = Field(default=None, ge=0, description="measured: a layer of the shadow")

    predictor: Literal["shadow", "random", "none"] = Field(default="shadow", description="who forecasts")
    recall: float = Field(default=0.9734, ge=0, le=1, description="share of experts that are forecast right")
    shadow_bits: float = Field(default=8, gt=0, le=32, description="width of the shadow's weights")
    align_token: int = Field(default=1, ge=0, description="steps between two alignments of the token; 0 is never")
    align_kv: int = Field(default=1, ge=0, description="steps between two alignments of keys and values; 0 is never")
    run_ahead: int = Field(
        default=0, ge=0, description="tokens the shadow may be ahead; 0 is the paper's late departure"
    )
    draft: int = Field(
        default=0, ge=0, le=15, description="tokens the shadow went on with that are verified with the newest, at most"
    )
    agreement: float = Field(default=1.0, ge=0, le=1, description="share of tokens a shadow that runs ahead gets right")

    prompt_kv: Literal["full", "own"] = Field(
        default="full",
        description="the prompt's keys and values in the shadow: the full model's, or computed by itself",
    )

    prompt_tokens: int = Field(default=128, ge=1, description="length of the prompt")
    prefill_chunk: int | None = Field(
        default=None, ge=1, description="tokens of a prompt that go through the model at once; all unless set"
    )
    output_tokens: int = Field(default=256, ge=1, le=4096, description="tokens to decode")
    prefill_overlap: bool = Field(default=False, description="a prompt's next loads begin before they are routed to")
    tokens_per_s: float | None = Field(default=None, gt=0, description="how many nodes, how fast a link for this?")
    seed: int = Field(default=0, ge=0, description="of the draws of wrong forecasts")

    @model_validator(mode="after")
    def _says_something(self) -> "PlanSettings":
        given = self.model_fields_set - {"config"}
        for name in _COMPARISONS:
            if getattr(self, name) and given - {name}:
                raise ValueError(f"{_flags([name])} takes nothing else, not {_flags(given - {name})}")
        if self.model is not None and given & {"shape", "weight_bits"}:
            raise ValueError("--model brings its own shape: leave out --shape and --weight-bits")
        for name, (other, value) in _ONLY_WITH.items():
            if name in given and getattr(self, other) != value:
                raise ValueError(f"{_flags([name])} says nothing without {_flags([other])} {value}")
        if "agreement" in given and self.run_ahead == 0:
            raise ValueError("--agreement says nothing without --run-ahead")
        if self.draft and (self.run_ahead == 0 or (self.align_token, self.align_kv) != (1, 1)):
            raise ValueError("--draft needs --run-ahead, and alignment in every step")
        for name in ("slots", "link_gb_per_s"):
            self._check_list(name)
        return self

    def _check_list(self, name: str) -> None:
        values = getattr(self, name)
        if len(values) not in (1, self.nodes):
            raise ValueError(f"{_flags([name])} takes one number or {self.nodes}, one for each node, not {len(values)}")
        if min(values) <= 0:
            raise ValueError(f"{_flags([name])} must be above 0")
        if self.tokens_per_s is not None and len(values) != 1:
            raise ValueError(f"--tokens-per-s needs nodes that are alike: one number for {_flags([name])}")


def shape_of(settings: PlanSettings) -> Shape:
    """The model that is asked about. Raises ValueError where there is none."""
    if settings.model is not None:
        return shape.of_store(settings.model)
    return shape.named(settings.shape, weight_bits=settings.weight_bits)


def machines_of(settings: PlanSettings, *, shape: Shape) -> Machines:
    """The machines that are asked about."""
    slots = settings.slots * (settings.nodes // len(settings.slots))
    links = settings.link_gb_per_s * (settings.nodes // len(settings.link_gb_per_s))
    return Machines(
        nodes=tuple(Node(slots=s, link_gb_per_s=g) for s, g in zip(slots, links, strict=True)),
        group_size=settings.group_size or min(shape.num_experts, shape.top_k * (1 + settings.draft)),
        device=Device(
            memory_gb_per_s=settings.memory_gb_per_s, tflops=settings.tflops, overhead_s=settings.overhead_ms / 1e3
        ),
        network=Network(
            latency_s=settings.network_latency_ms / 1e3,
            gbit_per_s=settings.network_gbit_per_s,
            overhead_s=settings.message_ms / 1e3,
        ),
        shared_core=settings.shared_core,
        shadow_bits=settings.shadow_bits,
        main_s=_seconds(settings.main_ms),
        expert_s=_seconds(settings.expert_ms),
        shadow_s=_seconds(settings.shadow_ms),
    )


def forecast_of(settings: PlanSettings) -> Forecast:
    """The forecasts that are asked about."""
    return Forecast(
        source=settings.predictor,
        recall=(settings.recall,),
        align_token=settings.align_token,
        align_kv=settings.align_kv,
        run_ahead=settings.run_ahead,
        draft=settings.draft,
        agreement=settings.agreement,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _flags(names: set[str] | list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))
