"""Settings of `odmoe-predictor`. Knows names, ranges and defaults; the reading is the base class's. No torch here,
so that bad settings are refused at once."""

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from odmoe_wire.checks import is_peer_id
from odmoe_wire.logs import LogFormat
from odmoe_wire.settings import RoleSettings, refuse_unused

# What is not the shadow: see `rivals`.
RivalKind = Literal["random", "frequency", "previous", "gate", "trained"]
Kind = Literal["shadow", RivalKind]
# Of the shadow's weights.
Precision = Literal["fp16", "int8", "nf4", "int4"]
# Which of them: all but routers and embeddings, or only those of the routed experts.
Scope = Literal["model", "experts"]
# The kinds for which a setting means anything; those that are not here are for all.
_USES: Final = {
    "precision": ("shadow",),
    "scope": ("shadow",),
    "run_ahead": ("shadow",),
    "feedback": ("shadow",),
    "device": ("shadow",),
    "look_ahead": ("gate",),
    "weights": ("trained",),
}


class PredictorSettings(RoleSettings):
    """Forecast which experts a model will need: a quantised shadow of it, aligned with the server at every step, or
    one of the cheaper predictors it is compared with."""

    model_config = SettingsConfigDict(env_prefix="ODMOE_PREDICTOR_")

    store: Path = Field(description="directory of the prepared store, the same as the server's (odmoe prepare)")
    server_endpoint: str = Field("tcp://127.0.0.1:5700", description="where the server is")
    endpoint: str = Field("tcp://127.0.0.1:5701", description="where node agents connect to this predictor")
    peer_id: str = Field("predictor", description="name in the cluster, and of the key")
    kind: Kind = Field(
        "shadow",
        description="shadow; or random, each layer's most frequent experts, the previous token's, the gates of later "
        "layers applied early, or a model trained on traces (odmoe train-predictor)",
    )
    look_ahead: int | None = Field(None, ge=1, description="for gate: how many layers ahead; else 1")
    weights: Path | None = Field(None, description="for trained: what odmoe train-predictor wrote")
    precision: Precision = Field("int8", description="of the shadow's weights; fp16 is bf16 where that is faster")
    scope: Scope = Field("model", description="what is quantised: the whole model, or its routed experts only")
    run_ahead: int = Field(8, ge=0, le=16, description="tokens to forecast beyond the newest the server has sent")
    feedback: bool = Field(
        False, description="correct the forecast of a token's later layers by what the server's gates saw of it"
    )
    threads: int = Field(1, ge=1, description="threads to compute with")
    device: str = Field("cpu", description="torch device of the shadow, such as cpu or cuda:0")
    verify: bool = Field(False, description="check the digest of every file of the store first")
    max_sequences: int = Field(64, ge=1, description="sequences that may be known here at a time")
    keys_dir: Path | None = Field(None, description="CURVE keys (odmoe keys DIR); needed when an endpoint is not local")
    health_file: Path | None = Field(
        None, description="file to touch with each life sign while the server has taken us in; for health checks"
    )
    exit_with_parent: bool = Field(False, description="end when the process that started this one ends")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least important messages to log"
    )
    log_format: LogFormat = Field("text", description="lines for people, or one JSON object a line")

    @field_validator("peer_id")
    @classmethod
    def _proper_name(cls, peer_id: str) -> str:
        if not is_peer_id(peer_id):
            raise ValueError("needs 1 to 64 letters, digits, '.', '_' or '-', no punctuation first")
        return peer_id

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        refuse_unused(self, choice="kind", uses=_USES)
        if self.kind == "trained" and self.weights is None:
            raise ValueError("--kind trained needs --weights, the file odmoe train-predictor wrote")
        return self
