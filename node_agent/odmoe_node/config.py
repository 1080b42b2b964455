"""Settings of a node agent. Knows how they are named and what they mean together, not what is done with them."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from odmoe_node.bank import Device
from odmoe_wire.checks import is_peer_id
from odmoe_wire.logs import LogFormat
from odmoe_wire.settings import RoleSettings

MEGABYTE = 1_000_000
DEFAULT_SLOTS = 2


class NodeSettings(RoleSettings):
    """A node agent: keeps a model's experts in host memory, loads the few that are needed into slots, computes."""

    model_config = SettingsConfigDict(env_prefix="ODMOE_NODE_")

    store: Path = Field(description="directory of the expert store, as made by `odmoe prepare`")
    server_endpoint: str = Field(description="where the server listens for nodes, such as tcp://10.0.0.1:5570")
    predictor_endpoint: str | None = Field(
        None, description="where the predictor listens for nodes; without it the node loads on demand only"
    )
    node_id: str | None = Field(
        None,
        description="name in the cluster, the same after a restart, different for each node; left out: host name, "
        "a digest of the store's path, and the lowest number no other such node on this host has",
    )
    slots: int | None = Field(
        None, ge=1, description=f"number of experts held at a time ({DEFAULT_SLOTS} unless --memory-mb is given)"
    )
    memory_mb: int | None = Field(
        None,
        ge=1,
        description="in place of --slots: budget for slots in megabytes of 1,000,000 bytes; below one expert, experts "
        "are loaded and computed in slices, and results equal those of whole experts within rounding",
    )
    threads: int = Field(1, ge=1, description="threads one computation may use")
    device: Device = Field(
        "auto",
        description="where the slots are; auto takes CUDA if there is any; emulated, for benchmarks: loads copy "
        "nothing and take the time of --link-gbps",
    )
    link_gbps: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="for --device emulated: its link's speed in gigabytes (1,000,000,000 bytes) per second",
    )
    verify: bool = Field(True, description="check the digests of the store's files at start")
    keys_dir: Path | None = Field(None, description="directory of CURVE keys; needed for endpoints on other hosts")
    hello_every_s: float = Field(0.25, gt=0, le=60, description="pace of hellos while there is no server")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    log_format: LogFormat = Field("text", description="how: lines for people, or one JSON object a line")
    health_file: Path | None = Field(
        None, description="file to touch with each life sign while the server has taken us in; for health checks"
    )
    exit_with_parent: bool = Field(False, description="end when the parent process ends, however it ends (Linux)")

    @field_validator("node_id")
    @classmethod
    def _can_name_a_peer(cls, value: str | None) -> str | None:
        if value is not None and not is_peer_id(value):
            raise ValueError("use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.slots is not None and self.memory_mb is not None:
            raise ValueError("give --slots or --memory-mb, not both: either decides the other")
        return self

    @model_validator(mode="after")
    def _link_speed_with_emulation(self) -> Self:
        if self.device == "emulated" and self.link_gbps is None:
            raise ValueError("--device emulated needs --link-gbps, the speed of its link in gigabytes per second")
        if self.device != "emulated" and self.link_gbps is not None:
            raise ValueError("--link-gbps is for --device emulated; other devices have links of their own")
        return self
