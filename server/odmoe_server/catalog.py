"""The model that is served, as clients see it: its names, its fingerprint, its defaults. Knows no weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from odmoe_server.engine_api import Sampling
from odmoe_server.openai.answers import Model, ModelList
from odmoe_server.openai.errors import UnknownModel


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """`names`: the first is the model's own, the others are aliases. `created` is unix time in seconds; `sampling`
    holds where a request says nothing."""

    names: Sequence[str]
    created: int
    context_length: int
    fingerprint: str
    sampling: Sampling = field(default_factory=Sampling)

    def check(self, name: str) -> None:
        """Raises `UnknownModel` for a name that is not served."""
        if name not in self.names:
            served = ", ".join(f"'{known}'" for known in self.names)
            raise UnknownModel(f"The model '{name}' does not exist. This server serves {served}.", param="model")

    def models(self) -> ModelList:
        """All names."""
        return ModelList(object="list", data=[self.model(name) for name in self.names])

    def model(self, name: str) -> Model:
        """One of them; raises `UnknownModel`."""
        self.check(name)
        return Model(
            id=name,
            object="model",
            created=self.created,
            owned_by="odmoe",
            root=self.names[0],
            max_model_len=self.context_length,
        )
