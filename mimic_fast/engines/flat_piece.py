"""A contiguous range of a flattened tensor: what a process holds of a parameter that is cut.

ZeRO cuts groups of flattened parameters and FSDP2 rows of each one; both hold such ranges. Kept as
ranges of the whole, a state fits any number of processes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatPiece:
    """Values ``[offset, offset + n)`` of a flattened tensor, for torch.distributed.checkpoint.

    Args:
        values: One-dimensional; loading writes into it.
        offset: Of its first value in the whole.
        total: Values of the whole.
    """

    def __init__(self, values: Tensor, *, offset: int, total: int) -> None:
        if values.ndim != 1 or not 0 <= offset <= offset + values.numel() <= total:
            raise ValueError(
                f"values {tuple(values.shape)} from {offset} are no range of {total} values"
            )
        self.values, self.offset, self.total = values, offset, total

    def on_cpu(self) -> "FlatPiece":
        """A copy that later steps do not change."""
        values = self.values.detach().to("cpu", copy=True)
        return FlatPiece(values, offset=self.offset, total=self.total)

    def like(self, values: Tensor) -> "FlatPiece":
        """The same range of another tensor of this shape."""
        return FlatPiece(values, offset=self.offset, total=self.total)

    # The names below are the protocol of torch.distributed.checkpoint for objects that are not
    # tensors (torch.distributed._checkpointable).
    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self._chunk(),
            properties=TensorProperties.create_from_tensor(self.values),
            size=torch.Size([self.total]),
        )
        index = MetadataIndex(fqn, self._chunk().offsets)
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(
            offsets=torch.Size([self.offset]), sizes=torch.Size([self.values.numel()])
        )
