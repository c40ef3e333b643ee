"""Every converter is undone by its counterpart, and nothing malformed comes through."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.errors import InvalidRequest
from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout
from kvrelay.obs.ledger import Ledger
from kvrelay.rpc import convert
from kvrelay.types import (
    Fingerprint,
    FinishReason,
    LinkSpeed,
    Role,
    SamplingParams,
    TransportOffer,
    WorkerIdentity,
    WorkerLoad,
)

uint32 = st.integers(0, 2**32 - 1)
positive32 = st.integers(1, 2**32 - 1)
uint63 = st.integers(0, 2**63 - 1)
duration = st.floats(0, 1e9)
name = st.text("abcXYZ019-._é", min_size=1, max_size=64)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)

layouts = st.builds(
    KvLayout,
    num_layers=positive32,
    block_size=positive32,
    num_kv_heads=positive32,
    head_dim=positive32,
    dtype=st.sampled_from(sorted(DTYPE_NUM_BYTES)),
)
fingerprints = st.builds(
    Fingerprint, model_digest=name, numerics=name, layout=layouts, protocol_version=uint32
)
offers = st.builds(TransportOffer, name=name, address=text, host=text)
identities = st.builds(
    WorkerIdentity,
    worker_id=st.from_regex(r"[a-z0-9.-]{1,64}", fullmatch=True),
    epoch=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
    role=st.sampled_from(Role),
    address=st.sampled_from(["127.0.0.1:1", "[::1]:65535", "prefill-0.pool:50051"]),
    pid=uint32,
    fingerprint=fingerprints,
    num_blocks=positive32,
    max_sequences=positive32,
    offers=st.lists(offers, max_size=convert.MAX_OFFERS).map(tuple),
)
links = st.builds(
    LinkSpeed, holder_id=name, transport=name, bytes_per_s=st.floats(0, 1e15, exclude_min=True)
)
loads = st.builds(
    WorkerLoad,
    free_blocks=uint32,
    cached_blocks=uint32,
    held_blocks=uint32,
    waiting_sequences=uint32,
    running_sequences=uint32,
    handoff_holds=uint32,
    queued_prompt_tokens=uint32,
    prefill_tokens_per_s=duration,
    step_s=duration,
    handoffs_total=uint63,
    preemptions_total=uint63,
    is_draining=st.booleans(),
    waiting_handoffs=uint32,
    links=st.lists(links, max_size=4).map(tuple),
)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=uint32,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**64 - 1),
)
ledgers = st.builds(
    Ledger,
    request_id=name,
    outcome=name,
    ttft_s=duration,
    ttft_stages=st.dictionaries(name, duration, max_size=6),
    gap1_s=duration,
    gap1_stages=st.dictionaries(name, duration, max_size=6),
    e2e_s=duration,
    tpot_s=duration,
    handoff_tax_s=st.none() | st.floats(-10, 10),
    attempts=uint32,
    lost_attempts=st.lists(name, max_size=3).map(tuple),
    prefill_worker=text,
    decode_worker=text,
    route_reason=text,
    transport=text,
    handoff_num_bytes=uint63,
    overlapped_num_bytes=uint63,
    prompt_tokens=uint32,
    completion_tokens=uint32,
    cached_prompt_tokens=uint32,
    move_gaps_s=st.lists(duration, max_size=3).map(tuple),
)


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


@given(layouts)
def test_layouts_come_back_equal(layout):
    """As they were sent."""
    assert convert.layout_from_wire(over_the_wire(convert.layout_to_wire(layout))) == layout


@given(fingerprints)
def test_fingerprints_come_back_equal(fingerprint):
    """So two equal workers stay equal, and their digests too."""
    back = convert.fingerprint_from_wire(over_the_wire(convert.fingerprint_to_wire(fingerprint)))

    assert back == fingerprint
    assert back.digest == fingerprint.digest


@given(offers)
def test_offers_come_back_equal(offer):
    """As they were sent."""
    assert convert.offer_from_wire(over_the_wire(convert.offer_to_wire(offer))) == offer


@given(identities)
def test_identities_come_back_equal(identity):
    """As they were sent."""
    back = convert.identity_from_wire(over_the_wire(convert.identity_to_wire(identity)))

    assert back == identity


@given(loads)
def test_loads_come_back_equal(load):
    """As they were sent."""
    assert convert.load_from_wire(over_the_wire(convert.load_to_wire(load))) == load


@given(samplings)
def test_sampling_comes_back_equal(sampling):
    """Bit for bit: a worker draws what the coordinator resolved."""
    assert convert.sampling_from_wire(over_the_wire(convert.sampling_to_wire(sampling))) == sampling


@given(ledgers)
def test_ledgers_come_back_equal_with_stages_in_order(ledger):
    """The order of stages is the order of time, so it is kept."""
    back = convert.ledger_from_wire(over_the_wire(convert.ledger_to_wire(ledger)))

    assert back == ledger
    assert list(back.ttft_stages) == list(ledger.ttft_stages)
    assert list(back.gap1_stages) == list(ledger.gap1_stages)


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reasons_come_back_equal(reason):
    """None, which is sent as unspecified, means that it goes on."""
    assert convert.finish_from_wire(convert.finish_to_wire(reason)) is reason


def test_an_unknown_finish_reason_is_refused():
    """A peer of a later version is not guessed at."""
    with pytest.raises(InvalidRequest, match="finish_reason"):
        convert.finish_from_wire(99)


LAYOUT = KvLayout(num_layers=2, block_size=16, num_kv_heads=2, head_dim=8, dtype="float32")
IDENTITY = WorkerIdentity(
    worker_id="prefill-0",
    epoch="0123456789abcdef",
    role=Role.PREFILL,
    address="127.0.0.1:5000",
    pid=1,
    fingerprint=Fingerprint(model_digest="d", numerics="n", layout=LAYOUT),
    num_blocks=4,
    max_sequences=2,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", ""),
        ("worker_id", "Prefill 0"),
        ("worker_id", "a\n"),
        ("worker_id", "a" * 65),
        ("epoch", "0123"),
        ("epoch", "0123456789ABCDEF"),
        ("role", 0),
        ("role", 9),
        ("address", ""),
        ("address", "127.0.0.1:0"),
        ("address", "x" * 300 + ":1"),
        ("num_blocks", 0),
        ("max_sequences", 0),
    ],
)
def test_a_malformed_identity_is_refused_by_field(field, value):
    """Before the registry ever sees it."""
    wire = convert.identity_to_wire(IDENTITY)
    setattr(wire, field, value)

    with pytest.raises(InvalidRequest) as refused:
        convert.identity_from_wire(wire)
    assert refused.value.field == field


def test_too_many_offers_are_refused():
    """Everything a peer can send is bounded."""
    wire = convert.identity_to_wire(IDENTITY)
    for i in range(convert.MAX_OFFERS + 1):
        wire.offers.add(name=f"t{i}")

    with pytest.raises(InvalidRequest, match="offers"):
        convert.identity_from_wire(wire)


@pytest.mark.parametrize(
    ("field", "value"), [("num_layers", 0), ("block_size", 0), ("head_dim", 0), ("dtype", "int3")]
)
def test_a_malformed_layout_is_refused_by_field(field, value):
    """It is a peer's mistake, never a failed assertion of ours."""
    wire = convert.layout_to_wire(LAYOUT)
    setattr(wire, field, value)

    with pytest.raises(InvalidRequest, match=f"layout.{field}"):
        convert.layout_from_wire(wire)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("min_p", 1.0),
        ("seed", None),
        ("temperature", None),
    ],
)
def test_malformed_sampling_is_refused_by_field(field, value):
    """Absent counts: workers have no defaults of their own."""
    wire = convert.sampling_to_wire(SamplingParams())
    if value is None:
        wire.ClearField(field)
    else:
        setattr(wire, field, value)

    with pytest.raises(InvalidRequest, match=f"sampling.{field}"):
        convert.sampling_from_wire(wire)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_load_that_cannot_be_is_refused(value):
    """A router that compares with NaN picks anything."""
    wire = convert.load_to_wire(WorkerLoad())
    wire.step_s = value

    with pytest.raises(InvalidRequest, match=r"load\.step_s"):
        convert.load_from_wire(wire)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("holder_id", ""),
        ("transport", "x" * 300),
        ("bytes_per_s", 0.0),
        ("bytes_per_s", math.nan),
        ("bytes_per_s", math.inf),
    ],
)
def test_a_link_that_cannot_be_is_refused(field, value):
    """A speed divides, so 0 is none."""
    wire = convert.load_to_wire(
        WorkerLoad(links=(LinkSpeed(holder_id="p0", transport="shm", bytes_per_s=1.0),))
    )
    setattr(wire.links[0], field, value)

    with pytest.raises(InvalidRequest, match=rf"link\.{field}"):
        convert.load_from_wire(wire)


def test_too_many_links_are_refused():
    """As many as a worker remembers, and no more."""
    wire = convert.load_to_wire(WorkerLoad())
    for i in range(convert.MAX_LINKS + 1):
        wire.links.add(holder_id=f"p{i}", transport="shm", bytes_per_s=1.0)

    with pytest.raises(InvalidRequest, match=r"load\.links"):
        convert.load_from_wire(wire)


def test_an_offer_may_bring_as_much_as_a_transport_needs_to_describe_itself():
    """And not a character more."""
    wire = convert.offer_to_wire(TransportOffer(name="nixl", address="a" * 4096, host="h"))
    assert len(convert.offer_from_wire(wire).address) == 4096

    wire.address += "a"
    with pytest.raises(InvalidRequest, match=r"offer\.address"):
        convert.offer_from_wire(wire)
