"""Compressing a trained model's embedding: what is chosen, measured, healed and left alone."""

import copy
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ryzen_callbacks import AnomalyDetector, TrainingMetricsCollector, TrainingMetricsReport

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop import export_pretrained, load_pretrained
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.model.embedding import QuantizedEmbedding, allocate_bits
from ryzen_llm.training import EmbeddingCompressor, OptimizerConfig, calibrate, heal, measure
from ryzen_llm.training.healing import HealingModule

ROOT = Path(__file__).parents[3]
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """A language of 64 words in which each is followed by one of four, the low ones most often."""
    draw = torch.Generator().manual_seed(0)
    successors = torch.randint(64, (64, 4), generator=draw).square() // 64
    ids = [0]
    for choice in torch.randint(4, (16 * 32,), generator=draw).tolist():
        ids.append(int(successors[ids[-1], choice]) ^ (choice == 3))
    return torch.tensor(ids[: 16 * 32]).view(16, 32)


@pytest.fixture(scope="module")
def model(text: torch.Tensor) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _ = model.loss(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def compressor(model: Transformer, text: torch.Tensor) -> EmbeddingCompressor:
    return EmbeddingCompressor(model, text)


@pytest.mark.parametrize("more", [False, True], ids=["", "tokens counted in more text"])
def test_calibration_is_the_fisher_matrix_of_head_and_lookup(
    model: Transformer, text: torch.Tensor, more: bool
) -> None:
    """Against its definition, token by token, with the expectation over targets taken exactly."""
    found = calibrate(model, text[:4], text[4:] if more else None)
    head = torch.zeros(32, 32)
    predicted = torch.zeros(64)
    for row in text[:4]:
        states = model.hidden_states(row[None])[0].detach()
        p = model.logits(states).softmax(-1).detach()
        for h, q in zip(states, p, strict=True):
            head += (1 - q.square().sum()) * torch.outer(h, h)
            predicted += q * (1 - q)
    torch.testing.assert_close(found.head_hessian, head / predicted.sum(), atol=1e-4, rtol=1e-4)
    counted = text if more else text[:4]
    occurring = torch.bincount(counted.flatten(), minlength=64) / counted.numel()
    expected = (0.35 * occurring + 0.65 * predicted / text[:4].numel() + 1e-10) ** 0.85
    torch.testing.assert_close(found.frequencies, expected / expected.sum(), atol=1e-6, rtol=1e-4)
    eigenvalues = torch.linalg.eigvalsh(found.input_hessian)
    assert eigenvalues.min() > -1e-6
    assert eigenvalues.max() > 0


def test_the_second_order_model_predicts_the_loss(model: Transformer, text: torch.Tensor) -> None:
    """Small random errors of all rows: the expected divergence of the head alone, within a third."""
    calibration = calibrate(model, text)
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * 0.02
    states = model.hidden_states(text).flatten(0, 1).detach()
    weight = model.embedding.dense_weight()
    p, q = (F.linear(states, w).log_softmax(-1) for w in (weight, weight + noise))
    measured = float(F.kl_div(q, p, log_target=True, reduction="batchmean"))
    predictions = p.exp()
    rows = (predictions * (1 - predictions)).mean(0)
    expected = float((rows * (noise @ calibration.head_hessian * noise).sum(-1)).sum() / 2)
    assert measured == pytest.approx(expected, rel=1 / 3)


def test_measure_gives_the_figures_of_all_logits_at_once(model: Transformer, text: torch.Tensor) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embedding.get_parameter("weight").mul_(1.2)
    found = measure(model, {"other": other}, text)["other"]
    with torch.no_grad():
        p, q = (m(text)[:, :-1].flatten(0, 1).log_softmax(-1) for m in (model, other))
    targets = text[:, 1:].flatten()
    assert found.perplexity == pytest.approx(math.exp(F.nll_loss(q, targets)), rel=1e-4)
    change = math.exp(F.nll_loss(q, targets) - F.nll_loss(p, targets)) - 1
    assert found.perplexity_increase == pytest.approx(change, rel=1e-3)
    kl = float(F.kl_div(q, p, log_target=True, reduction="batchmean"))
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_a_loss_beyond_what_exp_holds_is_an_infinite_perplexity(
    model: Transformer, text: torch.Tensor
) -> None:
    """And where both are, what one costs over the other is still a number."""
    far, farther = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        far.norm.weight.mul_(-1e4)
        farther.norm.weight.mul_(-1.00001e4)
    found = measure(model, {"far": far}, text)["far"]
    assert found.perplexity == math.inf
    assert found.perplexity_increase == math.inf
    assert 709 < found.kl < math.inf
    both = measure(far, {"farther": farther}, text)["farther"]
    assert both.perplexity == math.inf
    assert math.isfinite(both.perplexity_increase)


def test_a_ratio_is_reached_and_the_best_of_the_kinds_is_chosen(
    compressor: EmbeddingCompressor, model: Transformer
) -> None:
    before = copy.deepcopy(model.state_dict())
    choice = compressor.choose(ratio=2.5)
    assert choice.chosen.ratio >= 2.5
    assert choice.chosen.bytes_resident == choice.embedding.bytes_resident
    assert choice.chosen.quality.kl == min(candidate.quality.kl for candidate in choice.curve)
    assert {candidate.kind for candidate in choice.curve} >= {"quantized", "factorized"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_quality_budget_is_kept_and_a_larger_one_gives_more(compressor: EmbeddingCompressor) -> None:
    strict, loose = (compressor.choose(perplexity_increase=budget) for budget in (0.005, 0.2))
    assert strict.chosen.quality.perplexity_increase <= 0.005
    assert loose.chosen.quality.perplexity_increase <= 0.2
    assert loose.chosen.ratio > strict.chosen.ratio


def test_a_budget_looser_than_any_ratio_costs_gives_the_smallest_there_is(
    compressor: EmbeddingCompressor,
) -> None:
    """The search tries ratios that no kind reaches on its way, which is no fault of the user's."""
    choice = compressor.choose(perplexity_increase=1e6)
    assert choice.chosen.ratio == max(candidate.ratio for candidate in choice.curve)
    with pytest.raises(InputError, match="bytes are too few"):
        compressor.settings_for(1.2 * choice.chosen.ratio)


def test_healing_brings_the_divergence_down_and_trains_nothing_but_embedding_and_norm(
    compressor: EmbeddingCompressor, model: Transformer, text: torch.Tensor, tmp_path: Path
) -> None:
    before = copy.deepcopy(model.state_dict())
    available = 900  # 2 bits a number
    tiers = allocate_bits(compressor.weight, compressor.calibration, available)
    trainable = QuantizedEmbedding.trainable_from_dense(compressor.weight, compressor.calibration, bits=tiers)
    worse = compressor.quality(compressor.apply(copy.deepcopy(trainable).compressed()))
    report = tmp_path / "report.json"
    healed = heal(
        model,
        trainable,
        text,
        steps=60,
        learning_rate=3e-3,
        callbacks=[TrainingMetricsCollector(report), AnomalyDetector()],
        enable_progress_bar=False,
        accelerator="cpu",
    )
    assert compressor.quality(healed).kl < 0.7 * worse.kl
    assert healed.embedding.compressed() is healed.embedding, "packed"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.requires_grad for p in model.parameters())
    assert TrainingMetricsReport.model_validate_json(report.read_text()).epochs


def test_the_teacher_is_where_lightning_has_put_the_blocks_that_it_shares(
    compressor: EmbeddingCompressor, model: Transformer
) -> None:
    """No accelerator is needed to see it: the meta device is another one than the CPU, too."""
    teacher = copy.deepcopy(model)
    trainable = QuantizedEmbedding.trainable_from_dense(compressor.weight, compressor.calibration, bits=4)
    module = HealingModule(teacher, trainable, OptimizerConfig()).to("meta")
    module.on_fit_start()
    assert {tensor.device.type for tensor in teacher.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), "expected token ids"),
        (torch.zeros(2, 4, dtype=torch.int64), "has 8 tokens, expected 16 or more"),
        (torch.zeros(4, 8), "float32, expected token ids"),
        (torch.full((4, 8), 64), "ids from 64 to 64, expected 0 to 63"),
        (torch.zeros(1, 32, dtype=torch.int64), "has one row, expected two or more"),
        (
            torch.zeros(4, 65, dtype=torch.int64),
            "rows of 65 tokens, expected at most the model's longest .*, 64",
        ),
    ],
)
def test_calibration_text_that_cannot_work_is_refused(
    model: Transformer, ids: torch.Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        EmbeddingCompressor(model, ids)


@pytest.mark.parametrize("name", ["embedding.weight", "blocks.0.mlp.down_proj.weight"])
def test_a_damaged_model_is_refused(name: str, model: Transformer, text: torch.Tensor) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.get_parameter(name)[3, 4] = math.nan
    with pytest.raises(InputError, match="calibration is not finite: the text or the model is damaged"):
        EmbeddingCompressor(damaged, text)


def test_models_and_budgets_that_cannot_work_are_refused(
    compressor: EmbeddingCompressor, text: torch.Tensor
) -> None:
    with pytest.raises(InputError, match="not tied"):
        EmbeddingCompressor(Transformer(ModelConfig(**SHAPE, tie_embeddings=False)), text)
    hashed = Transformer(ModelConfig(**SHAPE, embedding="hashed", embedding_settings={"buckets": 8}))
    with pytest.raises(InputError, match="is hashed already, expected dense"):
        EmbeddingCompressor(hashed, text)
    with pytest.raises(InputError, match=r"ratio is 0\.5, expected more than 1"):
        compressor.choose(ratio=0.5)
    with pytest.raises(InputError, match="bytes are too few for 64 rows"):
        compressor.choose(ratio=100)
    with pytest.raises(InputError, match="one of them"):
        compressor.choose()
    with pytest.raises(InputError, match="allow more"):
        compressor.choose(perplexity_increase=-0.5)


@pytest.fixture
def script() -> ModuleType:
    """compress.py as a module."""
    spec = importlib.util.spec_from_file_location("compress", ROOT / "scripts" / "compress.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(tmp_path: Path) -> Transformer:
    """A model, which is also in the directory `dense`, beside a text for it."""
    tokenizer = Tokenizer.train(["a few words of text, a few more words"] * 9, 270)
    torch.manual_seed(0)
    small = Transformer(ModelConfig(**SHAPE | {"vocab_size": tokenizer.vocab_size}))
    export_pretrained(small, tokenizer, tmp_path / "dense")
    (tmp_path / "text.txt").write_text("a few more words of text. " * 200, encoding="utf-8")
    return small


@pytest.fixture
def command(small: Transformer, tmp_path: Path) -> list[str]:
    """Options of compress.py, the last of them the directory to write."""
    options = ["--model", str(tmp_path / "dense"), "--text", str(tmp_path / "text.txt"), "--context", "32"]
    options += ["--tokens", "512", "--ratio", "2", "--heal-steps", "2"]
    return [*options, "--out", str(tmp_path / "out")]


def test_the_script_writes_a_directory_that_loads_compressed(
    script: ModuleType,
    command: list[str],
    small: Transformer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And keeps a healed embedding only where it is better."""
    assert script.main(command) == 0
    assert "smaller than dense bf16" in capsys.readouterr().out
    loaded, _ = load_pretrained(tmp_path / "out")
    assert loaded.config.embedding != "dense"
    assert loaded.embedding.compression_ratio >= 2
    assert script.main(command) == 2, "the directory is there already"

    def harm(teacher: Transformer, *_: Any, **__: Any) -> Transformer:
        harmed = copy.deepcopy(teacher)
        torch.nn.init.constant_(harmed.norm.weight, -9.0)
        return harmed

    monkeypatch.setattr(script, "heal", harm)
    assert script.main([*command[:-1], str(tmp_path / "harmed")]) == 0
    assert "no better: not kept" in capsys.readouterr().out
    report = json.loads((tmp_path / "harmed" / "embedding_compression.json").read_text())
    assert report["healed"]["quality"]["kl"] > report["chosen"]["quality"]["kl"]
    kept, _ = load_pretrained(tmp_path / "harmed")
    assert kept.embedding.compression_ratio >= 2
    assert torch.equal(kept.norm.weight, small.norm.weight)


def test_the_script_writes_into_the_empty_directory_that_it_is_in(
    script: ModuleType, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.` has no name of its own for the healing's directory, which is beside it."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert script.main([*command[:-1], "."]) == 0
    assert load_pretrained(tmp_path / "out")[0].config.embedding != "dense"
    assert (tmp_path / "out-healing").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens=-5"], "--tokens 1 or more"),
        (["--tokens=0"], "--tokens 1 or more"),
        (["--out=~nobodyx/out"], "--out ~nobodyx/out: Could not determine home directory"),
        (["--out=" + "m" * 300], "mmm: File name too long"),
    ],
)
def test_the_script_refuses_bad_options_in_one_line(
    script: ModuleType,
    command: list[str],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before it calibrates."""
    assert script.main([*command, *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
