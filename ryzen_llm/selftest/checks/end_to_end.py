"""The whole way through."""

import copy

import torch

from ryzen_llm.decoding import Generator, SpeculativeDecoder
from ryzen_llm.selftest.trained import Trained, with_quantised_embedding
from ryzen_llm.training import OptimizerConfig, build_adamw


@torch.inference_mode()
def test_full_inference_pipeline(trained: Trained) -> None:
    prompt = trained.prompt
    out = Generator(trained.model, weights="fp32").generate(prompt, max_new_tokens=trained.new_tokens)
    assert out.new_ids.shape == (1, trained.new_tokens)
    assert torch.equal(out.ids[:, : prompt.shape[1]], prompt)
    logits = trained.model(out.ids)[:, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(-1, out.new_ids[..., None])[..., 0]
    # Each is the most likely token without a cache, too; where two are equal up to rounding, either will do.
    assert (chosen >= logits.amax(-1) - 1e-3).all()
    assert isinstance(trained.tokenizer.decode(out.new_ids[0].tolist()), str)


def test_training_pipeline_execution(trained: Trained) -> None:
    model = copy.deepcopy(trained.model).train()
    before = [p.detach().clone() for p in trained.model.parameters()]
    optimizer = build_adamw(model, OptimizerConfig(learning_rate=1e-4))
    batch = trained.val_batches[0][:4].to(trained.device)
    losses = []
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(6):
            loss, _ = model.loss(batch[:, :-1], batch[:, 1:])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0], f"six steps on one batch did not lower its loss: {losses}"
    assert all(torch.equal(p, q) for p, q in zip(trained.model.parameters(), before, strict=True))


def test_complete_optimization_chain(trained: Trained) -> None:
    """Quantised embedding, 8-bit cache and drafts together: the same text as undrafted, and little lost."""
    model = with_quantised_embedding(trained)
    generator = Generator(model, weights="fp32", cache="int8")
    plain, drafted = (
        SpeculativeDecoder(generator, drafter, widths=[4]).generate(
            trained.prompt, max_new_tokens=trained.new_tokens
        )
        for drafter in ([], ["suffix"])
    )
    assert plain.new_ids.tolist() == drafted.new_ids.tolist()
    batch = trained.val_batches[0][:2].to(trained.device)
    with torch.no_grad():
        losses = [float(m.loss(batch[:, :-1], batch[:, 1:])[0]) for m in (trained.model, model)]
    assert losses[1] < losses[0] * 1.05
