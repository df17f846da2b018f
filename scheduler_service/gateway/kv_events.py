"""The core's news of its prefix cache as the gateway's stream of batches."""

import time

import numpy as np
from smg_grpc_proto.generated import common_pb2 as common

from scheduler_service.kv_messages import KvCleared, KvEvents, KvRemoved, KvStored


class KvBatches:
    """Numbers the batches of one subscription from 1: first the parts of a snapshot, then changes."""

    def __init__(self) -> None:
        self._num_batches = 0
        self._num_events = 0

    def batch(self, message: KvEvents) -> common.KvEventBatch:
        """The next batch."""
        batch = common.KvEventBatch(sequence_number=self._num_batches + 1, timestamp=time.time(), dp_rank=0)
        if message.snapshot_parts:
            batch.snapshot.index = self._num_batches
            batch.snapshot.count = message.snapshot_parts
        for event in message.events:
            self._num_events += 1
            _fill(batch.events.add(event_id=self._num_events), event)
        self._num_batches += 1
        return batch


def _fill(target: common.KvCacheEvent, event: KvStored | KvRemoved | KvCleared) -> None:
    match event:
        case KvStored():
            blocks = np.frombuffer(event.token_ids, dtype="<i4").reshape(-1, event.block_size).tolist()
            for name, token_ids in zip(event.hashes, blocks, strict=True):
                target.stored.blocks.add(block_hash=name, token_ids=token_ids, block_size=event.block_size)
            if event.parent is not None:
                target.stored.parent_block_hash = event.parent
        case KvRemoved():
            target.removed.block_hashes.extend(event.hashes)
        case KvCleared():
            target.cleared.SetInParent()
