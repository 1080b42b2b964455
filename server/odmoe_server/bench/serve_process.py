"""The process of a server that is compared with ours: our HTTP side with another engine behind it.

Run as a module by `odmoe bench serve`, with a job as JSON in its only argument. Knows stores and engines; measures
nothing.
"""

import signal
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import uvicorn

from odmoe_model.skeleton import load_tokenizer
from odmoe_model.store import ExpertStore
from odmoe_server import listening
from odmoe_server.bench.prompts import TEXT
from odmoe_server.bench.resident import load_resident
from odmoe_server.bench.serve_engines import InstantEngine, ResidentEngine
from odmoe_server.config import ServeSettings
from odmoe_server.serving import build_app, lifespan_of, uvicorn_config
from odmoe_wire import logs
from odmoe_wire.lifeline import end_with_parent


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """`engine`: transformers with all weights, or instant tokens; `max_batch` is the former's, `paced` the latter's."""

    engine: Literal["resident", "instant"]
    store: str
    name: str
    listen_fd: int
    max_batch: int = 1
    paced: bool = False


def main() -> None:
    """Serve until a signal comes."""
    end_with_parent(signal.SIGKILL)
    logs.configure("warning", "text", role="bench")
    torch.set_num_threads(1)
    job = msgspec.json.decode(sys.argv[1], type=Job)
    store = ExpertStore.open(Path(job.store), verify=False)
    chosen: dict[str, Any] = {"served_model_names": (job.name,), "drain_s": 0, "max_queued": 1024}
    settings = ServeSettings(model=job.store, **chosen)
    engine = _engine(job, store)
    app = build_app(settings, store=store, engine=engine, lifespan=lifespan_of(engine))
    uvicorn.Server(uvicorn_config(app, settings)).run(sockets=[listening.inherited(job.listen_fd)])


def _engine(job: Job, store: ExpertStore) -> ResidentEngine | InstantEngine:
    context_length = int(store.manifest.config["max_position_embeddings"])
    if job.engine == "resident":
        return ResidentEngine(load_resident(store), context_length=context_length, max_batch=job.max_batch)
    token_ids = load_tokenizer(store).encode(TEXT, add_special_tokens=False)
    return InstantEngine(token_ids, context_length=context_length, paced=job.paced)


if __name__ == "__main__":
    main()
