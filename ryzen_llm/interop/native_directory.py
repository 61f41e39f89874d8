"""A directory that holds a model with its compressed embedding as it is.

Only `load_pretrained` reads it: its `model_type` is none of transformers', which refuses it rather than
load it wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.interop.fields import Fields
from ryzen_llm.interop.hf_config import checked_layers
from ryzen_llm.interop.weights import TensorSource, compare_shapes, model_without_memory
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.model.embedding import Embedding

MODEL_TYPE = "ryzen_llm"
_SHAPE = "model"
_EMBEDDING = "embedding."


def native_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json."""
    return {"model_type": MODEL_TYPE, _SHAPE: config.to_dict()}


def native_weights(
    model: Transformer, embedding: Embedding, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The model's weights by their own names in `dtype`, and as they are those of `embedding`, which takes
    the place of the model's own.
    """
    for name, tensor in model.state_dict().items():
        if not name.startswith(_EMBEDDING):
            yield name, tensor.to("cpu", dtype).contiguous()
    for name, tensor in embedding.state_dict().items():
        yield _EMBEDDING + name, tensor.to("cpu").contiguous()


def parse_native(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The inverse of `native_config`. Raises InputError for anything else."""
    shape = Fields(values, where).group(_SHAPE)
    if shape is None:
        raise InputError(f"{where}: {_SHAPE} is missing")
    fields: dict[str, Any] = values[_SHAPE]
    checked_layers(shape.whole("num_layers"), where)
    try:
        return ModelConfig.from_dict(fields)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error


def load_native(config: ModelConfig, source: TensorSource, dtype: torch.dtype) -> Transformer:
    """The model (on the CPU, in eval mode) with the weights of `source` in `dtype`; codes stay as they are.

    Raises InputError that lists the tensors that are missing, not expected or of another shape, and for one
    of another kind of dtype or with codes that do not fit.
    """
    state = model_without_memory(config, source.where).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    compare_shapes(expected, source)
    model = Transformer(config).to(dtype)
    with torch.no_grad():
        for name, place in model.state_dict().items():
            tensor = source.read(name)
            if tensor.dtype != place.dtype and not (tensor.is_floating_point() and place.is_floating_point()):
                found, wanted = (str(t.dtype).removeprefix("torch.") for t in (tensor, place))
                raise InputError(f"{source.where}: {name} is of dtype {found}, expected {wanted}")
            place.copy_(tensor)
    try:
        model.embedding.check_loaded()
    except InputError as error:
        raise InputError(f"{source.where}: {error}") from error
    return model.eval()
