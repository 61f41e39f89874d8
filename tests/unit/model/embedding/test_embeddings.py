"""Every kind of embedding: one matrix behind lookup, logits, loss and bytes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ryzen_llm.decoding import Generator
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.model.embedding import (
    EMBEDDINGS,
    Calibration,
    CompressedEmbedding,
    Embedding,
    FactorizedEmbedding,
    ProductEmbedding,
    QuantizedEmbedding,
    allocate_bits,
    build_embedding,
)

VOCAB, HIDDEN = 96, 64
SHAPE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
SHAPE |= {"intermediate_size": 64, "max_position_embeddings": 32}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "factorized": ("factorized", {"rank": 24}),
    "hashed": ("hashed", {"buckets": 10}),
    "product": ("product", {"width": 4, "entries": 16, "stages": 2}),
    "quantized": ("quantized", {"bits": 4}),
    "quantized in tiers": ("quantized", {"bits": [[8, 8], [20, 5], [68, 3]]}),
    "quantized in groups": ("quantized", {"bits": 6, "group_size": 16, "rotate": False}),
}
TRELLIS = "quantized in trellis codes"
"""Made from a dense matrix only."""
TRELLIS_SETTINGS: dict[str, Any] = {"bits": [[8, 6], [20, 4], [68, 2]], "code": "trellis"}
FORMS = [*((name, packed) for name in SETTINGS for packed in (False, True)), (TRELLIS, True)]


def config(name: str) -> ModelConfig:
    kind, settings = SETTINGS[name]
    return ModelConfig(**SHAPE, embedding=kind, embedding_settings=settings)


def build(name: str, packed: bool = False) -> Embedding:
    if name == TRELLIS:
        return QuantizedEmbedding.from_dense(0.02 * dense(), calibration(), **TRELLIS_SETTINGS)
    torch.manual_seed(0)
    embedding = build_embedding(config(name))
    return embedding.compressed() if packed else embedding


def calibration(seed: int = 0, vocab: int = VOCAB) -> Calibration:
    """Frequencies as uneven as words', and hidden states that prefer some directions."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(500, HIDDEN, generator=draw) * torch.logspace(0, -2, HIDDEN)
    frequencies = 1 / torch.arange(1, vocab + 1)[torch.randperm(vocab, generator=draw)]
    return Calibration(frequencies / frequencies.sum(), states.T @ states / 500, 0.01 * torch.eye(HIDDEN))


def dense(seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "packed"), FORMS)
def test_lookup_logits_and_loss_are_those_of_one_matrix(name: str, packed: bool) -> None:
    embedding = build(name, packed)
    weight = embedding.dense_weight()
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, 7), generator=draw)
    hidden = torch.randn(2, 7, HIDDEN, generator=draw)
    torch.testing.assert_close(embedding.lookup(ids), weight[ids])
    logits = F.linear(hidden, weight)
    for few in (embedding.logits(hidden), torch.stack([embedding.logits(row) for row in hidden[0]])):
        torch.testing.assert_close(few, logits if few.dim() == 3 else logits[0], atol=2e-5, rtol=1e-4)
    many = torch.randn(40, HIDDEN, generator=draw)
    torch.testing.assert_close(embedding.logits(many), F.linear(many, weight), atol=2e-5, rtol=1e-4)
    loss, correct = embedding.loss(hidden, ids)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1), ids.flatten()), atol=1e-5, rtol=1e-5
    )
    assert correct == (logits.argmax(-1) == ids).sum()


@pytest.mark.parametrize(("name", "packed"), FORMS)
def test_bytes_resident_are_those_of_every_storage(name: str, packed: bool) -> None:
    embedding = build(name, packed).to(torch.bfloat16)
    tensors = [*embedding.parameters(), *embedding.buffers()]
    assert embedding.bytes_resident == sum(t.numel() * t.element_size() for t in tensors)
    attributes = [v for m in embedding.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert not attributes, "no tensor hides where it would not be counted"


def test_the_ratio_is_against_bf16_and_counts_codes_scales_positions_and_signs() -> None:
    embedding = QuantizedEmbedding(VOCAB, HIDDEN, bits=[[32, 6], [64, 2]], reordered=True)
    codes = 32 * HIDDEN * 6 // 8 + 64 * HIDDEN * 2 // 8
    # And scales and centres in bf16, positions of 16 bits, signs.
    everything = codes + 2 * VOCAB + 2 * 2 * HIDDEN + 2 * VOCAB + HIDDEN
    assert embedding.compression_ratio == pytest.approx(2 * VOCAB * HIDDEN / everything)
    assert build("dense").compression_ratio == 1
    assert build("factorized").compression_ratio == pytest.approx(VOCAB * HIDDEN / (24 * (VOCAB + HIDDEN)))


@pytest.mark.parametrize(("name", "packed"), FORMS)
def test_a_checkpoint_holds_the_form_it_was_saved_in(name: str, packed: bool) -> None:
    model = Transformer(ModelConfig(**SHAPE))
    model.replace_embedding(build(name, packed))
    loaded = Transformer(ModelConfig.from_dict(model.config.to_dict()))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.embedding.dense_weight(), model.embedding.dense_weight())
    assert loaded.embedding.bytes_resident == model.embedding.bytes_resident


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_of_any_kind_takes_weights_that_come_later(name: str) -> None:
    """Built on the meta device, as by `load_pretrained`, with values in nothing that is not saved."""
    model = Transformer(config(name))
    with torch.device("meta"):
        empty = Transformer(config(name))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.embedding.dense_weight(), model.embedding.dense_weight())


@pytest.mark.parametrize("name", ["factorized", "product", "quantized", "quantized in tiers"])
def test_packing_changes_nothing(name: str) -> None:
    torch.testing.assert_close(
        build(name, True).dense_weight(), build(name).dense_weight(), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_in_another_dtype_computes_in_it_before_and_after_packing(
    name: str, dtype: torch.dtype
) -> None:
    """As a dense model does with the matrix that the embedding stands for."""
    torch.manual_seed(0)
    model, plain = Transformer(config(name)).eval().to(dtype), Transformer(ModelConfig(**SHAPE)).to(dtype)
    plain.blocks, plain.norm = model.blocks, model.norm
    ids = torch.tensor([[3, 1, 4]])
    for embedding in (model.embedding, model.embedding.compressed()):
        model.replace_embedding(embedding)
        with torch.no_grad():
            plain.load_state_dict({"embedding.weight": embedding.dense_weight()}, strict=False)
            found, expected = model(ids), plain(ids)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


@pytest.mark.parametrize("name", SETTINGS)
def test_training_from_scratch_learns(name: str) -> None:
    """Which token follows which, by heart."""
    torch.manual_seed(0)
    model = Transformer(config(name))
    ids = torch.randint(VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 3
    if isinstance(model.embedding, ProductEmbedding | QuantizedEmbedding):
        trained = float(model.loss(ids[:, :-1], ids[:, 1:])[0])
        model.embedding = model.embedding.compressed()
        assert float(model.loss(ids[:, :-1], ids[:, 1:])[0]) == pytest.approx(trained, rel=1e-3)


@pytest.mark.parametrize("name", ["quantized", "quantized in tiers", "quantized in groups"])
def test_rounding_begins_late_with_grids_that_fit_by_then(name: str) -> None:
    """Unrounded until then, yet with gradients for all that is trained, as distributed training expects."""
    embedding = build(name)
    assert isinstance(embedding, QuantizedEmbedding)
    assert embedding.weight is not None
    grown = 50 * dense() + 3
    with torch.no_grad():
        embedding.weight.copy_(grown)
    embedding.at_step(69, 100)
    unrounded = embedding.dense_weight()
    hidden, targets = torch.randn(1, 3, HIDDEN), torch.tensor([[1, 2, 3]])
    embedding.loss(hidden, targets)[0].backward()
    moved = {name: bool(p.grad is not None and p.grad.any()) for name, p in embedding.named_parameters()}
    assert moved == {"weight": True, "centre": False, "log_scale": False}
    assert all(p.grad is not None for p in embedding.parameters())
    kept = embedding.compressed().dense_weight()
    torch.testing.assert_close(embedding.dense_weight(), unrounded, atol=0, rtol=0)
    embedding.at_step(70, 100)
    begun = embedding.dense_weight()
    torch.testing.assert_close(begun, kept, atol=1e-3, rtol=1e-3)
    errors = (begun - unrounded).square().mean(-1) / (unrounded - unrounded.mean(0)).square().mean()
    for start, stop, bits in embedding._spans:
        # Of the best grid for normal numbers: 0.119 at 2 bits to 0.00104 at 6 (Max 1960).
        assert errors[start:stop].mean() < 5 * 4.0**-bits
    embedding.at_step(70, 100)  # the next of several batches of one step
    torch.testing.assert_close(embedding.dense_weight(), begun, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["quantized", "quantized in tiers", "quantized in groups"])
def test_until_rounding_begins_training_is_that_of_the_dense_twin(name: str) -> None:
    """To the bit, from the same seed: what a pair then differs by is what rounding costs."""
    losses = {}
    for kind in ("dense", name):
        torch.manual_seed(0)
        model = Transformer(config(kind))
        ids = torch.randint(VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[kind] = []
        for step in range(10):
            model.embedding.at_step(step, 10)
            loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[kind].append(loss.item())
    assert losses[name][:7] == losses["dense"][:7]
    assert losses[name][7] != losses["dense"][7]


def test_what_is_saved_before_rounding_begins_can_be_rounded() -> None:
    """Saving changes nothing in training, and the loaded one has grids that fit."""
    embedding = build("quantized")
    assert isinstance(embedding, QuantizedEmbedding)
    assert embedding.weight is not None
    with torch.no_grad():
        embedding.weight.copy_(50 * dense())
    embedding.at_step(0, 100)
    before = embedding.dense_weight()
    loaded = build("quantized")
    loaded.load_state_dict(embedding.state_dict())
    assert torch.equal(embedding.dense_weight(), before)
    assert (loaded.dense_weight() - before).square().mean() < 0.02 * before.square().mean()


def test_error_feedback_beats_rounding_in_what_the_text_says_matters() -> None:
    """At the same bytes, on the same rows: at least twice as little expected loss."""
    found = QuantizedEmbedding.from_dense(dense(), calibration(), bits=4)
    rounded = QuantizedEmbedding.from_dense(dense(), Calibration.uniform(VOCAB, HIDDEN), bits=4)
    costs = [float(calibration().cost(e.dense_weight() - dense()).sum()) for e in (found, rounded)]
    assert found.bytes_resident == rounded.bytes_resident
    assert costs[0] < costs[1] / 2


def test_trellis_codes_beat_grids_at_no_more_bytes() -> None:
    """By a seventh of the expected loss, though the start of so short a row costs a quarter of a bit a
    column.
    """
    weight, text = dense(vocab=1024), calibration(vocab=1024)
    costs = {}
    for code in ("grid", "trellis"):
        tiers = allocate_bits(weight, text, 2 * weight.numel() // 5, code)
        made = QuantizedEmbedding.from_dense(weight, text, bits=tiers, code=code).to(torch.bfloat16)
        assert made.bytes_resident <= 2 * weight.numel() // 5
        costs[code] = float(text.cost(made.dense_weight().float() - weight).sum())
    assert costs["trellis"] < 0.86 * costs["grid"]


def test_tiers_by_frequency_beat_equal_bits_at_no_more_bytes() -> None:
    weight, text = dense(vocab=1024), calibration(vocab=1024)  # enough rows to pay for the tiers' centres
    equal = QuantizedEmbedding.from_dense(weight, text, bits=4).to(torch.bfloat16)
    tiers = allocate_bits(weight, text, equal.bytes_resident)
    tiered = QuantizedEmbedding.from_dense(weight, text, bits=tiers).to(torch.bfloat16)
    costs = [float(text.cost(e.dense_weight().float() - weight).sum()) for e in (tiered, equal)]
    assert tiered.bytes_resident <= equal.bytes_resident
    assert len(tiers) > 2
    assert costs[0] < costs[1]


def test_what_is_asked_for_fits_where_positions_take_four_bytes() -> None:
    """As in a vocabulary of more than 2^16, such as Gemma's."""
    weight = dense(vocab=70_000)
    text = calibration(vocab=70_000)
    tiers = allocate_bits(weight, text, 2 * weight.numel() // 4)
    made = QuantizedEmbedding.from_dense(weight, text, bits=tiers).to(torch.bfloat16)
    assert 0.999 * weight.numel() / 2 < made.bytes_resident <= weight.numel() / 2


@pytest.mark.parametrize("bits", [3, [[16, 6], [80, 3]]])
def test_what_all_rows_have_in_common_costs_no_bits(bits: int | list[list[int]]) -> None:
    """Shifted by one vector ten times as long as a row, the rows are as exact as before."""
    shift = 10 * dense(seed=1)[0].bfloat16().float()
    errors = []
    for weight in (dense(), dense() + shift):
        made = QuantizedEmbedding.from_dense(weight, calibration(), bits=bits)
        errors.append(float((made.dense_weight() - weight).square().mean()))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_the_trainable_form_starts_where_the_packed_one_is() -> None:
    bits = [[16, 6], [80, 3]]
    packed = QuantizedEmbedding.from_dense(dense(), calibration(), bits=bits)
    trainable = QuantizedEmbedding.trainable_from_dense(dense(), calibration(), bits=bits)
    torch.testing.assert_close(trainable.dense_weight(), packed.dense_weight(), atol=1e-5, rtol=1e-5)


def test_the_whitened_factors_are_the_best_of_their_rank() -> None:
    """Against gradient descent on the same objective from the same point, and against the plain SVD."""
    made = FactorizedEmbedding.from_dense(dense(), calibration(), rank=16)
    hessian, rows = calibration().hessian, calibration().frequencies.sqrt()[:, None]

    def cost(weight: torch.Tensor) -> torch.Tensor:
        error = rows * (weight - dense())
        return (error @ hessian * error).sum()

    optimum = float(cost(made.dense_weight()))
    u, s, v = torch.linalg.svd(dense(), full_matrices=False)
    assert optimum < float(cost(u[:, :16] * s[:16] @ v[:16]))
    optimizer = torch.optim.LBFGS(made.parameters(), max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cost(made.codes @ made.widen)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(cost(made.codes @ made.widen)) > optimum * 0.999


def test_product_codes_of_as_many_entries_as_rows_are_exact() -> None:
    uniform = Calibration.uniform(VOCAB, HIDDEN)
    made = ProductEmbedding.from_dense(dense(), uniform, width=8, entries=VOCAB)
    torch.testing.assert_close(made.dense_weight(), dense(), atol=1e-4, rtol=1e-4)


def test_more_stages_are_nearer() -> None:
    costs = []
    for stages in (1, 2, 3):
        made = ProductEmbedding.from_dense(dense(), calibration(), width=8, entries=16, stages=stages)
        costs.append(float((made.dense_weight() - dense()).square().mean()))
    assert costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("pq", {}, "model.embedding is 'pq', expected one of dense, factorized"),
        ("dense", {"rank": 3}, "unknown model.embedding_settings.rank: dense takes none"),
        ("factorized", {"rnak": 3}, "unknown model.embedding_settings.rnak: factorized takes rank"),
        ("factorized", {"rank": 65}, "rank is 65, expected a whole number from 1 to 64"),
        ("factorized", {"rank": 0}, "rank is 0, expected"),
        ("hashed", {"buckets": 97}, "buckets is 97, expected a whole number from 1 to 96"),
        ("product", {"width": 5, "entries": 16}, "width is 5, expected a divisor of hidden_size = 64"),
        ("product", {"entries": 300}, "entries is 300, expected a whole number from 2 to 96"),
        ("quantized", {"bits": 9}, "bits is 9, expected a whole number from 1 to 8"),
        ("quantized", {"bits": [[5, 4]]}, "bits has 5 rows, expected vocab_size = 96"),
        ("quantized", {"bits": [4, 4]}, r"bits is \[4, 4\], expected 1 to 8, or a list of"),
        ("quantized", {"group_size": 24}, "group_size is 24, expected a divisor of hidden_size = 64"),
        ("quantized", {"code": "huffman"}, "code is 'huffman', expected trellis or grid"),
        ("quantized", {"code": "trellis"}, "code is 'trellis', expected grid: trellis codes are made from"),
    ],
)
def test_settings_that_cannot_work_are_named(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_embedding(ModelConfig(**SHAPE, embedding=kind, embedding_settings=settings))


@pytest.mark.parametrize("kind", [k for k in EMBEDDINGS.values() if issubclass(k, CompressedEmbedding)])
def test_damaged_weights_and_foreign_calibrations_are_refused(kind: type[CompressedEmbedding]) -> None:
    with pytest.raises(InputError, match="not finite"):
        kind.from_dense(dense().index_fill(0, torch.tensor([3]), float("nan")), calibration())
    with pytest.raises(InputError, match=r"calibration is of a \(96, 64\) embedding, weight is \(95, 64\)"):
        kind.from_dense(dense()[1:], calibration())


def test_too_few_bytes_are_refused_with_the_least_that_is_possible() -> None:
    with pytest.raises(InputError, match="100 bytes are too few for 96 rows of 64: expected at least"):
        allocate_bits(dense(), calibration(), 100)


@pytest.mark.parametrize(("name", "packed"), FORMS)
def test_ids_out_of_range_are_refused(name: str, packed: bool) -> None:
    for wrong in (-1, VOCAB):
        with pytest.raises((IndexError, InputError)):
            build(name, packed).lookup(torch.tensor([[0, wrong]]))


@pytest.mark.parametrize(
    "name",
    [
        "quantized in tiers",
        TRELLIS,
        pytest.param("product", marks=pytest.mark.slow),
        pytest.param("quantized in groups", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_decoding_step_is_one_graph_and_gives_the_same(name: str) -> None:
    embedding = build(name, packed=True)
    hidden, ids = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0)), torch.tensor([[5]])

    def step(ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return embedding.lookup(ids), embedding.logits(hidden)

    with torch.no_grad():
        found, expected = torch.compile(step, fullgraph=True)(ids, hidden), step(ids, hidden)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_generation_decodes_with_the_packed_form_and_leaves_the_model_alone(name: str) -> None:
    torch.manual_seed(0)
    model = Transformer(config(name)).eval()
    generator = Generator(model, weights="fp32")
    plain = Transformer(ModelConfig(**SHAPE)).eval()
    plain.load_state_dict({"embedding.weight": model.embedding.dense_weight()}, strict=False)
    plain.blocks, plain.norm = model.blocks, model.norm
    prompt = torch.tensor([[3, 1, 4]])
    found = generator.generate(prompt, max_new_tokens=12).ids
    assert torch.equal(found, Generator(plain, weights="fp32").generate(prompt, max_new_tokens=12).ids)
    assert generator.model.embedding.compressed() is generator.model.embedding
    assert model.config == config(name)
