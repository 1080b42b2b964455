"""What a fault leaves behind must block nobody: calls whose clients have gone, socket files of who was killed."""

import threading
import time
from pathlib import Path

import pytest
import torch
import zmq

from odmoe_server.cluster.calls import CallError
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.cluster.events import LayerCall
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_wire.checks import Limits
from odmoe_wire.link import RouterLink
from odmoe_wire.messages import Span, ToServer

CALL = LayerCall(call_id=1, spans=(Span(1, 0),), layer=0, counts={3: 1})


def test_who_hangs_up_while_no_node_is_there_is_noticed_soon() -> None:
    config = ClusterConfig(store_digest="d", package_version="1", num_layers=1, num_experts=8, group_size=1)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = RouterLink.bind("inproc://unheard", context=context, accept=ToServer, limits=Limits())
    driver = ClusterDriver(ClusterState(config=config), link=link)
    has_gone = threading.Event()
    driver.is_unheard = has_gone.is_set
    driver.start()
    try:
        pending = driver.submit(CALL, {3: torch.ones(1, 4)})
        threading.Timer(0.2, has_gone.set).start()
        began_s = time.monotonic()
        with pytest.raises(CallError, match="nobody waits"):
            driver.await_call(pending)
        assert time.monotonic() - began_s < config.call_timeout_s / 4
        until_s = time.monotonic() + 10
        while driver.state.dispatch.calls:
            assert time.monotonic() < until_s, "the call is still there"
            time.sleep(0.01)
    finally:
        driver.stop()
        context.term()


def test_a_socket_file_left_behind_blocks_nobody(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/server.sock"
    killed = zmq.Context[zmq.Socket[bytes]]()
    left = killed.socket(zmq.ROUTER)
    left.bind(endpoint)
    kept = tmp_path / "kept"
    (tmp_path / "server.sock").rename(kept)  # closing would take it away; a kill does not
    left.close(linger=0)
    killed.term()
    kept.rename(tmp_path / "server.sock")
    context = zmq.Context[zmq.Socket[bytes]]()
    link = RouterLink.bind(endpoint, context=context, accept=ToServer, limits=Limits())
    assert link.endpoint == endpoint
    link.close()
    context.term()
