"""The bytes of every message, fixed: a change of the protocol shows here and wants a new PROTOCOL_VERSION."""

from types import UnionType
from typing import get_args

import pytest

from odmoe_wire import messages as m
from odmoe_wire.codec import ProtocolError, decode, encode
from support.sample_messages import LIMITS, SAMPLES, union_of

UNIONS = {"server": m.ToServer, "node": m.ToNode, "predictor": m.ToPredictor}
RECEIVERS: dict[type, set[str]] = {
    m.Hello: {"server", "predictor"},
    m.SlotReport: {"server"},
    m.ShadowReport: {"server"},
    m.Loaded: {"server"},
    m.LoadFailed: {"server"},
    m.Result: {"server"},
    m.ComputeFailed: {"server"},
    m.Bye: {"server", "node", "predictor"},
    m.Heartbeat: {"server", "node", "predictor"},
    m.ProtocolErrorNotice: {"server", "node", "predictor"},
    m.Welcome: {"node", "predictor"},
    m.Refused: {"node", "predictor"},
    m.View: {"node", "predictor"},
    m.Compute: {"node"},
    m.Load: {"node"},
    m.Release: {"node"},
    m.Cancel: {"node"},
    m.Withdraw: {"node"},
    m.Start: {"predictor"},
    m.Align: {"predictor"},
    m.Routed: {"predictor"},
    m.Rollback: {"server", "node"},
    m.End: {"predictor"},
    m.Schedule: {"server", "node"},
}
EPOCH = 9
GOLDEN_HEADERS: dict[type, str] = {
    m.Hello: (
        "9404098aa474797065a548656c6c6fa4726f6c65a46e6f6465a7706565725f6964a66e6f64652d31ab696e6361726e61"
        "74696f6e63af7061636b6167655f76657273696f6ea5302e312e30ac73746f72655f646967657374a461623132a5736c"
        "6f747303ac6275646765745f6279746573ce00100000a76c6f61645f7573cd09c4a577616e7473a6696e7075747390"
    ),
    m.SlotReport: (
        "940409de0019a474797065aa536c6f745265706f7274aa757365645f736c6f747301af6163636f756e7465645f627974"
        "657302ab6172656e615f627974657303ac6275646765745f627974657304a97273735f627974657305ab6c6f6164735f"
        "746f74616c06b26c6f6164735f6661696c65645f746f74616c07b56c6f6164735f63616e63656c6c65645f746f74616c"
        "08b26c6f6164735f756e757365645f746f74616c09b06c6f61645f62797465735f746f74616c0aac6c6f61645f735f74"
        "6f74616ccb3fe0000000000000af636f6d707574655f735f746f74616ccb3fd0000000000000b570726f746f636f6c5f"
        "6572726f72735f746f74616c0bb66c6f6164735f62726f6b656e5f6f66665f746f74616c0cb262726f6b656e5f6f6666"
        "5f735f746f74616ccb3fc0000000000000af6576696374696f6e735f746f74616c0db46c6174655f666f726563617374"
        "735f746f74616c0eb06f766572666c6f7765645f746f74616c0fab7374616c655f746f74616c10b06475706c69636174"
        "65735f746f74616c11ad657870697265645f746f74616c12b1756e64656c6976657265645f746f74616c13b16c6f6f70"
        "5f6572726f72735f746f74616c14ab6c6f61645f636f756e7473dc0010000102030405060708090a0b0c0d0e0f90"
    ),
    m.ShadowReport: (
        "94040988a474797065ac536861646f775265706f7274af666f726563617374735f746f74616c01af726f6c6c6261636b"
        "735f746f74616c02b1756e64656c6976657265645f746f74616c03ad726566757365645f746f74616c04ae7265626972"
        "7468735f746f74616c05b570726f746f636f6c5f6572726f72735f746f74616c06b16c6f6f705f6572726f72735f746f"
        "74616c0790"
    ),
    m.Loaded: (
        "94040988a474797065a64c6f61646564a56c6179657201a665787065727405a66c6f61645f73cb3fe0000000000000aa"
        "6c6f61645f6279746573cd0400a96f6e5f64656d616e64c3a561676f5f73cb3fd0000000000000a468656c6492920105"
        "92030790"
    ),
    m.LoadFailed: (
        "94040984a474797065aa4c6f61644661696c6564a56c6179657201a665787065727405a6726561736f6ea96e6f206d656d6f727990"
    ),
    m.Result: (
        "94040986a474797065a6526573756c74aa726571756573745f696403a56c6179657201a774696d696e6773919505a46c"
        "617465cb3fe0000000000000cb3fd0000000000000c3a468656c6491920105a66c6f61646564909192a7666c6f617433"
        "32920303"
    ),
    m.ComputeFailed: (
        "94040984a474797065ad436f6d707574654661696c6564aa726571756573745f696403a4636f6465a765787069726564"
        "a6726561736f6ea8746f6f206c61746590"
    ),
    m.Bye: ("94040982a474797065a3427965a6726561736f6ea873746f7070696e6790"),
    m.Heartbeat: ("94040982a474797065a9486561727462656174a5636f756e740c90"),
    m.ProtocolErrorNotice: ("94040982a474797065b350726f746f636f6c4572726f724e6f74696365a6726561736f6ea26e6f90"),
    m.Welcome: (
        "94040983a474797065a757656c636f6d65ab6865617274626561745f73cb3fe0000000000000ac6c6f73745f61667465"
        "725f73cb400000000000000090"
    ),
    m.Refused: ("94040982a474797065a752656675736564a6726561736f6ead616e6f746865722073746f726590"),
    m.View: (
        "94040985a474797065a456696577a76d656d626572739293a66e6f64652d31030093a66e6f64652d3204cd09c4aa6772"
        "6f75705f73697a6502a46d6f6465a36c7275a7706c6163696e67a665787065727490"
    ),
    m.Compute: (
        "94040989a474797065a7436f6d70757465aa726571756573745f696403a57370616e739193072902a56c6179657201a7"
        "65787065727473920205a6636f756e7473920102a574746c5f73cb3ff8000000000000a472756e7393010101a76c6561"
        "76696e67919200039192a7666c6f61743332920303"
    ),
    m.Load: (
        "94040985a474797065a44c6f6164a57370616e739193072902a56c6179657201a765787065727473920205a76c656176"
        "696e679192000390"
    ),
    m.Release: ("94040983a474797065a752656c65617365a57370616e739193072902a56c617965720190"),
    m.Cancel: ("94040982a474797065a643616e63656ca873657175656e63650790"),
    m.Withdraw: ("94040982a474797065a85769746864726177aa726571756573745f69640390"),
    m.Start: ("94040982a474797065a55374617274a873657175656e63650790"),
    m.Align: (
        "94040985a474797065a5416c69676ea873657175656e636507a8706f736974696f6e29a6746f6b656e7392cd012c02a5"
        "63616368659294a26b7601290294a573746174650029019392a862666c6f61743136940102010292a862666c6f617431"
        "36940102010292a575696e74389102"
    ),
    m.Routed: (
        "94040984a474797065a6526f75746564a47370616e93072902a56c6179657201a7657870657274739202059192a7666c"
        "6f61743332920203"
    ),
    m.Rollback: ("94040983a474797065a8526f6c6c6261636ba873657175656e636507a8706f736974696f6e2890"),
    m.End: ("94040982a474797065a3456e64a873657175656e63650790"),
    m.Schedule: (
        "94040985a474797065a85363686564756c65a47370616e93072902a56c6179657201a765787065727473920205a6746f"
        "6b656e7392cd012c0290"
    ),
}
every_message = pytest.mark.parametrize("message_type", SAMPLES, ids=lambda t: t.__name__)


def test_protocol_version_of_these_bytes() -> None:
    assert m.PROTOCOL_VERSION == 4


def test_every_message_of_the_protocol_is_here() -> None:
    defined = {
        value
        for value in vars(m).values()
        if isinstance(value, type) and issubclass(value, m.Message) and value is not m.Message
    }
    assert defined == set(get_args(m.AnyMessage)) == set(SAMPLES) == set(RECEIVERS) == set(GOLDEN_HEADERS)


@every_message
def test_header_bytes_and_raw_frames(message_type: type) -> None:
    message, blobs = SAMPLES[message_type]
    header, *rest = encode(message, epoch=EPOCH, blobs=blobs)
    assert bytes(header).hex() == GOLDEN_HEADERS[message_type]
    assert rest == [blob.data for blob in blobs]


@every_message
def test_golden_bytes_decode_to_the_same_message(message_type: type) -> None:
    message, blobs = SAMPLES[message_type]
    frames = [bytes.fromhex(GOLDEN_HEADERS[message_type]), *(blob.data for blob in blobs)]
    received = decode(frames, accept=union_of(message_type), limits=LIMITS)
    assert (received.epoch, received.message, received.blobs) == (EPOCH, message, blobs)


@every_message
@pytest.mark.parametrize(("role", "union"), UNIONS.items(), ids=list(UNIONS))
def test_each_role_takes_exactly_its_own(message_type: type, role: str, union: UnionType) -> None:
    message, blobs = SAMPLES[message_type]
    frames = encode(message, epoch=EPOCH, blobs=blobs)
    if role in RECEIVERS[message_type]:
        assert decode(frames, accept=union, limits=LIMITS).message == message
    else:
        with pytest.raises(ProtocolError, match="not accepted"):
            decode(frames, accept=union, limits=LIMITS)
