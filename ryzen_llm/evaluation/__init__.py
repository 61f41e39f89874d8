"""How good a model is: perplexity on a text, and lm-evaluation-harness tasks (`evaluation.harness`)."""

from ryzen_llm.evaluation.perplexity import Perplexity, measure_perplexity

__all__ = ["Perplexity", "measure_perplexity"]
