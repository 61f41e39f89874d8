"""Models in and out: checkpoints of this project; other formats follow."""

from ryzen_llm.interop.load import load_pretrained

__all__ = ["load_pretrained"]
