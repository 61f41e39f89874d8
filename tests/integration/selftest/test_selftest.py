"""The self-tests run on a trained model and tell the truth about what is broken and what is missing."""

import json
from pathlib import Path

import pytest
import torch

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.selftest import IntegrationTestRunner

BROKEN = """
import pytest

@pytest.fixture
def unusable():
    raise OSError("no such thing")

def test_broken(trained):
    print("not to be seen")
    assert trained.model.config.vocab_size == 1, "on purpose"

def test_sound(trained):
    assert trained.tokenizer.vocab_size == 300

def test_missing():
    pytest.skip("not built yet")

def test_no_setup(unusable):
    pass
"""


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(
            vocab_size=300,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([Path(__file__).read_text("utf-8")], 300)


@pytest.fixture(scope="module")
def val_batches() -> list[torch.Tensor]:
    return [torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(1))]


def test_all_sixteen_checks_run(
    model: Transformer, tokenizer: Tokenizer, val_batches: list[torch.Tensor], tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    path = tmp_path / "integration_test_report.json"
    runner = IntegrationTestRunner(model, tokenizer, val_batches)
    report = runner.run(path, on_progress=lambda *progress: seen.append(progress))
    assert [test.error for test in report.tests if test.status in ("failed", "error")] == []
    summary = report.summary
    assert (summary.total, summary.passed, summary.skipped) == (16, 16, 0)
    assert summary.pass_rate == 1.0
    assert [done for _, done, _ in seen] == list(range(1, 17))
    assert {total for *_, total in seen} == {16}
    assert json.loads(path.read_text()) == report.model_dump()


def test_a_broken_check_is_failed_with_its_traceback(
    model: Transformer,
    tokenizer: Tokenizer,
    val_batches: list[torch.Tensor],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "unit.py").write_text(BROKEN)
    (tmp_path / "performance.py").write_text("import no_such_module_here")
    report = IntegrationTestRunner(model, tokenizer, val_batches, checks=tmp_path).run()
    tests = {test.name: test for test in report.tests}
    assert tests["test_broken"].status == "failed"
    assert "on purpose" in (tests["test_broken"].error or "")
    assert "assert trained.model.config.vocab_size == 1" in (tests["test_broken"].traceback or "")
    assert tests["test_sound"].status == "passed"
    assert tests["test_missing"].status == "skipped"
    assert tests["test_no_setup"].status == "error"
    assert tests["performance.py"].status == "error"
    assert "no_such_module_here" in (tests["performance.py"].error or "")
    assert (report.summary.failed, report.summary.errors) == (1, 2)
    assert report.summary.pass_rate == 0.25
    assert capfd.readouterr().out == ""


def test_all_skipped_is_no_pass_rate(
    model: Transformer, tokenizer: Tokenizer, val_batches: list[torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "unit.py").write_text("import pytest\ndef test_x(): pytest.skip('why')\n")
    report = IntegrationTestRunner(model, tokenizer, val_batches, checks=tmp_path).run()
    assert report.summary.pass_rate is None
    assert report.tests[0].error == "why"


def test_no_checks_is_an_error(
    model: Transformer, tokenizer: Tokenizer, val_batches: list[torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no checks in"):
        IntegrationTestRunner(model, tokenizer, val_batches, checks=tmp_path)
