"""A draft model by its path drafts what it would write itself."""

from pathlib import Path

import pytest
import torch
from random_models import random_ids, save

from ryzen_llm.decoding import DraftModelDrafter, Generator
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_drafters, load_pretrained


@pytest.mark.parametrize("compile", [False, True])
def test_a_draft_model_is_read_from_its_path(compile: bool, tmp_path: Path) -> None:
    """A model that drafts for itself is right at every token, whatever its passes read before."""
    save("llama", tmp_path)
    model, _ = load_pretrained(tmp_path)
    settings = {"weights": "fp32", "compile": compile}
    plain = Generator(model, **settings).generate(random_ids(1, 20), max_new_tokens=24)
    drafters = load_drafters([f"draft_model:{tmp_path}"], model, **settings)
    generator = Generator(model, drafter=drafters, **settings)
    found = generator.generate(random_ids(1, 20), max_new_tokens=24)
    assert torch.equal(found.ids, plain.ids)
    assert generator.speculation is not None
    statistics = generator.speculation.statistics
    assert not statistics.failures
    assert statistics.accepted.get("draft_model", 0) == statistics.drafted.get("draft_model", 0)
    drafter = drafters[0]
    assert isinstance(drafter, DraftModelDrafter)
    text = plain.ids[0].tolist()
    session = drafter.begin(text[:21], torch.zeros(1))
    assert list(session.propose(5).tokens) == text[21:26]


def test_the_other_drafters_stay_names_and_a_path_is_needed(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model, _ = load_pretrained(tmp_path)
    assert load_drafters(["suffix", "recycling"], model) == ["suffix", "recycling"]
    with pytest.raises(InputError, match="unknown drafter 'eagle': choose of suffix, recycling, heads:PATH"):
        load_drafters(["eagle"], model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no model; expected a Hugging Face directory"):
        load_drafters([f"draft_model:{tmp_path / 'empty'}"], model)
    with pytest.raises(InputError, match=r"give what interop.load_drafters makes of it"):
        Generator(model, drafter=f"draft_model:{tmp_path}", weights="fp32")
