"""Models in and out: Hugging Face directories, GGUF files, checkpoints of this project."""

from ryzen_llm.interop.chat import render_chat
from ryzen_llm.interop.drafters import load_drafters
from ryzen_llm.interop.export import export_pretrained
from ryzen_llm.interop.load import load_pretrained
from ryzen_llm.interop.weights import DTYPES

__all__ = ["DTYPES", "export_pretrained", "load_drafters", "load_pretrained", "render_chat"]
