"""Generating text with a model."""

from ryzen_llm.decoding.generator import Generation, Generator
from ryzen_llm.decoding.sampling import Sampling

__all__ = ["Generation", "Generator", "Sampling"]
