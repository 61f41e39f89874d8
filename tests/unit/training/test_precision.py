"""bf16 where the hardware multiplies it, fp32 elsewhere, and the choice says why."""

import re

import pytest
import torch

from ryzen_llm.errors import InputError
from ryzen_llm.training import choose_precision, precision

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["bf16", "no bf16"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(precision, "supports_bf16", lambda device: request.param)
    return bool(request.param)


def test_without_a_request_the_hardware_decides(has_bf16: bool) -> None:
    chosen, why = choose_precision(None, CPU)
    assert chosen == ("bf16-mixed" if has_bf16 else "32-true")
    assert ("no bf16" in why) == (not has_bf16)


def test_requested_bf16_falls_back_where_it_would_be_emulated(has_bf16: bool) -> None:
    chosen, why = choose_precision("bf16-mixed", CPU)
    if has_bf16:
        assert (chosen, why) == ("bf16-mixed", "as configured")
    else:
        assert chosen == "32-true"
        assert "bf16-mixed" in why
        assert "falls back to fp32" in why


def test_requested_fp32_is_kept(has_bf16: bool) -> None:
    assert choose_precision("32-true", CPU) == ("32-true", "as configured")


@pytest.mark.parametrize("requested", ["bf16-true", "64-true", "16-mixed", "32", ""])
def test_a_precision_without_a_recipe_is_refused(requested: str, has_bf16: bool) -> None:
    with pytest.raises(InputError, match=re.escape(f"is {requested!r}, expected bf16-mixed or 32-true")):
        choose_precision(requested, CPU)


def test_a_processor_without_bf16_instructions_counts_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU reports reaches the choice; CUDA is not asked."""
    reported = {"avx2": True, "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: reported, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: pytest.fail("asked CUDA about the CPU"))
    assert choose_precision(None, CPU)[0] == "32-true"
    reported["avx512_bf16"] = True
    assert choose_precision(None, CPU)[0] == "bf16-mixed"
