"""Fully sharded training (FSDP2): each process holds a part of every weight, gradient and optimizer state."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from ryzen_llm.model import Transformer

REST = "meta.pt"
"""Where Lightning puts all that is neither weights nor optimizer states in the folder of a checkpoint."""

_WEIGHTS = "state_dict."


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all processes; `trainer.strategy: fsdp` means this one.

    Lightning's own "fsdp" is FSDP1, which needs a GPU, and which knows only whole modules' forward. A
    checkpoint is a folder with a file from each process.
    """

    def setup_environment(self) -> None:
        """Shard over every process there is."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()


def shard(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard the blocks, and the rest of the model together, in place."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")


def whole_state_dict(model: Transformer) -> dict[str, Tensor]:
    """The weights on the CPU, put together where they are sharded. A collective; they are on rank 0 only."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def is_sharded(path: Path) -> bool:
    """Whether `path` is the folder of a checkpoint in shards."""
    return (path / REST).is_file()


def read_sharded(folder: Path) -> dict[str, Any]:
    """A checkpoint's content as a checkpoint in one file would have it, without optimizer states.

    Nothing in it is executed. Raises OSError, RuntimeError, ValueError, KeyError, EOFError or UnpicklingError
    where it is incomplete or no checkpoint.
    """
    content = torch.load(folder / REST, map_location="cpu", weights_only=True)
    reader = _PlainReader(folder)
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and isinstance(entry, dcp_metadata.TensorStorageMetadata)
    }
    try:
        load(weights, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # which is no Exception
        raise RuntimeError(f"its shards cannot be read: {error}") from error
    content["state_dict"] = {name.removeprefix(_WEIGHTS): tensor for name, tensor in weights.items()}
    return dict(content)


class _PlainReader(FileSystemReader):
    """PyTorch's reader unpickles the list of what there is; this one knows no more than that needs."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _PlainUnpickler(file).load()
        if not isinstance(found, dcp_metadata.Metadata):
            raise pickle.UnpicklingError(
                f"holds {type(found).__name__}, expected the list of a checkpoint's tensors"
            )
        found.storage_meta = found.storage_meta or dcp_metadata.StorageMeta()
        return found


class _PlainUnpickler(pickle.Unpickler):
    _KNOWN = {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta"),
            *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    } | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        *(("torch", name) for name in ("float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # Python before 3.11.4 names an enum's member with it
            return _memory_format
        if module == "pathlib._local":  # Python 3.13's, which no other has
            module = "pathlib"
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _memory_format(enum: object, name: object) -> Any:
    formats = dcp_metadata._MEM_FORMAT_ENCODING
    if enum is not formats or name not in formats.__members__:
        raise pickle.UnpicklingError(f"asks for {name!r} of {enum!r}, which no checkpoint needs")
    return formats[str(name)]
