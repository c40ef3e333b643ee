"""Members of a pool, naming only what a test is about."""

from coordinator.registry import Member
from kvrelay.handoff.ticket import KEY_NUM_BYTES
from kvrelay.kv.layout import KvLayout
from kvrelay.types import Fingerprint, Role, TransportOffer, WorkerIdentity, WorkerLoad

LAYOUT = KvLayout(num_layers=1, block_size=4, num_kv_heads=1, head_dim=2, dtype="float32")
FINGERPRINT = Fingerprint(model_digest="m", numerics="scripted", layout=LAYOUT)
EPOCH = "00000000000000e0"
OFFERS = (TransportOffer(name="stream", address="", host="h"),)


def identity(name, role=Role.DECODE, *, epoch=EPOCH, fingerprint=FINGERPRINT, offers=OFFERS):
    return WorkerIdentity(
        worker_id=name,
        epoch=epoch,
        role=role,
        address="127.0.0.1:1",
        pid=1,
        fingerprint=fingerprint,
        num_blocks=64,
        max_sequences=8,
        offers=offers,
    )


def member(name, role=Role.DECODE, *, load=None, placed=(), **kwargs):
    return Member(
        identity=identity(name, role, **kwargs),
        load=load or WorkerLoad(free_blocks=64),
        heard_at_s=0.0,
        ticket_key=bytes(KEY_NUM_BYTES),
        is_linked=True,
        is_heard=True,
        placed={(f"r{i}", 1): tokens for i, tokens in enumerate(placed)},
    )
