"""A holder as a process: prints where it is as one JSON line, and lives until stdin ends."""

import asyncio
import json
import sys
from dataclasses import asdict

from kvrelay.kv.layout import KvLayout
from tests.support.kv_peer import open_peer


async def main(
    kind: str, layout: dict[str, object], num_blocks: int, seed: int, worker_id: str
) -> None:
    opened = open_peer(
        kind, layout=KvLayout(**layout), num_blocks=num_blocks, seed=seed, worker_id=worker_id
    )
    async with opened as peer:
        remote = peer.hold()
        said = {
            "worker_id": remote.worker_id,
            "epoch": remote.epoch,
            "address": remote.address,
            "offer": asdict(remote.offer),
        }
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
