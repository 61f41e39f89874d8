"""The table of setup says what is used, and which key or measurement made it so."""

import dataclasses

from ryzen_llm.claims import Optimizations
from ryzen_llm.model import ModelConfig
from ryzen_llm.pipeline.parts import chosen_parts
from ryzen_llm.pipeline.report import Kernels
from ryzen_llm.training import OpChoice
from ryzen_llm.training.kernel_trials import Trial

TINY = ModelConfig.from_name("tiny")


def test_everything_on() -> None:
    trials = [Trial(name="a", milliseconds=1.0), Trial(name="b", excluded="wrong"), Trial(name="c")]
    choices = [
        OpChoice(op="norm", choice="a", trials=trials, measured_now=True),
        OpChoice(op="loss", choice="automatic", reason="no time was left to try it"),
    ]
    parts = chosen_parts(TINY, Optimizations(kv_cache="k8v4", drafters=("suffix",)), Kernels(choices=choices))
    assert [tuple(part) for part in parts] == [
        ("kernel norm", "a", "the fastest of 2 measured now"),
        ("kernel loss", "automatic", "no time was left to try it: left to the rules of thumb"),
        ("embedding", "dense; a copy is compressed once it is trained", "embedding_ratio: 3.5"),
        ("key-value cache", "k8v4", "kv_cache: k8v4"),
        ("drafters", "suffix: the best at each step", "drafters: suffix"),
    ]


def test_everything_off() -> None:
    off = Optimizations(**{f.name: False for f in dataclasses.fields(Optimizations) if f.type == "bool"})
    parts = chosen_parts(TINY, off, Kernels(reason="switched off by enable_kernel_optimization: false"))
    assert [(part.name, part.used) for part in parts] == [
        ("kernels", "plain PyTorch"),
        ("embedding", "dense"),
        ("key-value cache", "dense"),
        ("drafters", "none"),
    ]
    assert all("enable_" in part.why for part in parts)


def test_an_embedding_that_is_trained_compressed() -> None:
    config = dataclasses.replace(TINY, embedding="quantized", embedding_settings={"bits": 4})
    assert ("embedding", "quantized", "model.embedding: quantized") in chosen_parts(
        config, Optimizations(), Kernels()
    )
