"""When a node says hello and when it gives a life sign, and when it takes the other side for lost."""

from odmoe_wire.messages import Bye, Heartbeat, Refused, Welcome
from odmoe_wire.session import Session, Standing

WELCOME = Welcome(heartbeat_s=1.0, lost_after_s=3.0)


def test_hello_is_due_at_once_and_then_at_its_pace() -> None:
    session = Session(hello_every_s=0.5, now=10.0)
    assert session.due(10.0) == "hello"
    session.said(10.0)
    assert session.due(10.4) is None
    assert session.wait_s(10.4) <= 0.1001
    assert session.due(10.5) == "hello"


def test_after_the_welcome_life_signs_are_due_at_the_other_sides_pace() -> None:
    session = Session(hello_every_s=0.1, now=0.0)
    session.said(0.0)
    session.heard(WELCOME, 5.0)
    assert session.is_joined
    assert session.due(5.9) is None
    assert session.due(6.0) == "heartbeat"
    session.said(6.0)
    assert session.wait_s(6.0) == 1.0


def test_silence_loses_the_other_side_once_and_hello_is_due_at_once() -> None:
    session = Session(hello_every_s=0.5, now=0.0)
    session.heard(WELCOME, 0.0)
    session.heard(Heartbeat(count=1), 2.0)
    assert not session.check_lost(4.9)
    assert session.check_lost(5.0)
    assert not session.check_lost(5.1)
    assert session.due(5.1) == "hello"


def test_a_second_welcome_does_not_disturb_the_rhythm() -> None:
    session = Session(hello_every_s=0.5, now=0.0)
    session.heard(WELCOME, 0.0)
    session.heard(WELCOME, 0.9)
    assert session.due(1.0) == "heartbeat"


def test_bye_means_hello_again() -> None:
    session = Session(hello_every_s=0.5, now=0.0)
    session.said(0.0)
    session.heard(WELCOME, 0.0)
    session.heard(Bye(reason="not admitted: say hello"), 0.1)
    assert not session.is_joined
    assert session.due(0.1) == "hello"


def test_a_refused_node_says_nothing_more() -> None:
    session = Session(hello_every_s=0.5, now=0.0)
    session.heard(Refused(reason="another store"), 0.0)
    assert session.standing is Standing.REFUSED
    assert session.due(100.0) is None
    assert session.wait_s(100.0) > 1.0
