"""What is chosen is right and fastest here, is kept, and cannot break training."""

import copy
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import CANDIDATES, PLAIN, KernelChoices, Workload, swiglu
from ryzen_llm.kernels.candidates import Candidate
from ryzen_llm.kernels.regions import REGIONS
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.training import KernelOptimizer, OpChoice, kernel_optimizer
from ryzen_llm.training.kernel_trials import LARGEST_ERROR, try_all

SHAPE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 512,
}


def build(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**SHAPE, **changes}))


def slow(gate_up: Tensor) -> Tensor:
    time.sleep(0.02)
    return swiglu(gate_up)


def no_backward(gate_up: Tensor) -> Tensor:
    return swiglu(gate_up.detach())


def wrong(gate_up: Tensor) -> Tensor:
    return 1.05 * swiglu(gate_up)


def right_but_for_the_gradient(gate_up: Tensor) -> Tensor:
    return swiglu(gate_up).detach() + (2 * gate_up - 2 * gate_up.detach())[..., ::2]


def nan(gate_up: Tensor) -> Tensor:
    return swiglu(gate_up) * float("nan")


def out_of_memory(gate_up: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


class OnlyAtFirst:
    """Passes the check and fails while it is timed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gate_up: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("an illegal memory access")
        return swiglu(gate_up)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put other forms of SwiGLU in the place of the registered ones."""

    def register(**functions: Callable[[Tensor], Tensor]) -> None:
        candidates = {name: Candidate(function) for name, function in functions.items()}
        monkeypatch.setitem(CANDIDATES, "swiglu", candidates)  # type: ignore[arg-type]

    return register


def choose(
    model: Transformer, cache_dir: Path, op: str = "swiglu", context: int = 6, bf16: bool = False
) -> OpChoice:
    optimizer = KernelOptimizer(model, 2, context, bf16=bf16, compile=False, cache_dir=cache_dir)
    (found,) = (choice for choice in optimizer.optimize() if choice.op == op)
    return found


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_where_gradients_are_off_the_same_is_measured(
    mode: Callable[[], AbstractContextManager[None]], forms: Callable[..., None], tmp_path: Path
) -> None:
    """Backward, too: a form without one is left out as it is elsewhere."""
    model = build()
    forms(slow=slow, no_backward=no_backward, fast=swiglu)
    with mode():
        choice = choose(model, tmp_path)
    assert choice.choice == "fast"
    assert choice.reason is None
    assert [trial.name for trial in choice.trials if trial.milliseconds is not None] == ["slow", "fast"]
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())


def test_the_fastest_that_is_right_is_chosen_and_the_others_have_their_reasons(
    forms: Callable[..., None], tmp_path: Path
) -> None:
    model = build()
    forms(
        slow=slow,
        wrong=wrong,
        gradient=right_but_for_the_gradient,
        nan=nan,
        no_backward=no_backward,
        memory=out_of_memory,
        crash=OnlyAtFirst(),
        fast=swiglu,
    )
    choice = choose(model, tmp_path)
    reasons = {trial.name: trial.excluded for trial in choice.trials}
    assert choice.choice == "fast"
    assert model.blocks[0].mlp.activation is swiglu
    assert reasons["slow"] is reasons["fast"] is None
    for name in ("wrong", "gradient", "nan"):
        assert str(reasons[name]).startswith("wrong: off by"), name
    assert str(reasons["no_backward"]).startswith("failed: RuntimeError")
    assert reasons["memory"] == "out of memory"
    assert reasons["crash"] == "failed: RuntimeError: an illegal memory access"
    timed = {trial.name for trial in choice.trials if trial.milliseconds is not None}
    assert timed == {"slow", "fast"}


def test_where_nothing_can_be_measured_the_model_trains_by_the_rules_of_thumb(
    forms: Callable[..., None], tmp_path: Path
) -> None:
    model = build()
    forms(plain=out_of_memory, memory=out_of_memory)
    choice = choose(model, tmp_path)
    assert choice.choice == "automatic"
    assert choice.reason
    assert not list(tmp_path.glob("kernels/swiglu*.json")), "a failure is not kept"


def test_a_choice_is_measured_once_for_a_shape(forms: Callable[..., None], tmp_path: Path) -> None:
    calls = []

    def counted(gate_up: Tensor) -> Tensor:
        calls.append(gate_up.shape)
        return swiglu(gate_up)

    forms(slow=slow, counted=counted)
    first = choose(build(), tmp_path)
    seen = len(calls)
    second = choose(build(), tmp_path)
    assert len(calls) == seen
    assert (first.measured_now, second.measured_now) == (True, False)
    assert first.trials == second.trials
    choose(build(), tmp_path, context=7)
    assert len(calls) > seen, "another shape"
    seen = len(calls)
    choose(build(), tmp_path, bf16=True)
    assert len(calls) > seen, "another dtype"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"choice": {"op": "swiglu", "choice": "no such form"}}'])
def test_a_damaged_file_is_measured_and_written_anew(
    content: str, forms: Callable[..., None], tmp_path: Path
) -> None:
    forms(slow=slow, fast=swiglu)
    choose(build(), tmp_path)
    (file,) = tmp_path.glob("kernels/swiglu*.json")
    file.write_text(content)
    assert choose(build(), tmp_path).measured_now
    assert json.loads(file.read_text())["choice"]["choice"] == "fast"


def test_without_a_folder_to_write_to_it_still_chooses(forms: Callable[..., None], tmp_path: Path) -> None:
    forms(slow=slow, fast=swiglu)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="are not kept"):
        choice = choose(build(), tmp_path / "file")
    assert choice.choice == "fast"


def test_a_form_that_ended_the_process_is_left_out_the_next_time(
    forms: Callable[..., None], tmp_path: Path
) -> None:
    forms(plain=slow, fatal=swiglu)
    choose(build(), tmp_path)
    (file,) = tmp_path.glob("kernels/swiglu*.json")
    file.unlink()
    file.with_suffix(".trying").write_text("fatal")  # as a process that was killed by it leaves it
    choice = choose(build(), tmp_path)
    assert choice.choice == "plain"
    assert choice.trials[1].excluded == "the process ended while it was tried"


def test_without_the_time_for_all_forms_none_is_preferred_for_having_been_first(
    forms: Callable[..., None], tmp_path: Path
) -> None:
    forms(slow=slow, fast=swiglu)
    model = build()
    choices = KernelOptimizer(model, 2, 6, compile=False, seconds=0, cache_dir=tmp_path).optimize()
    (choice,) = (choice for choice in choices if choice.op == "swiglu")
    assert choice.choice == "automatic"
    assert choice.reason == "no time was left to try it"
    assert choose(model, tmp_path).choice == "fast", "the next run measures"


def test_a_kept_choice_that_does_not_suit_here_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may be shared with a machine of the same processor, but of more memory."""

    def needs_memory(work: Workload) -> str | None:
        return "too large" if work.memory_bytes == 64 else None

    forms = {"slow": Candidate(slow), "slow, too": Candidate(slow), "fast": Candidate(swiglu, needs_memory)}
    monkeypatch.setitem(CANDIDATES, "swiglu", forms)  # type: ignore[arg-type]
    assert [choose(build(), tmp_path).choice for _ in range(2)] == ["fast", "fast"]
    monkeypatch.setattr(Workload, "memory_bytes", 64)
    choice = choose(build(), tmp_path)
    assert choice.measured_now
    assert choice.choice == "slow"


def test_another_instruction_set_is_measured_by_itself(
    forms: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ATEN_CPU_CAPABILITY may take PyTorch one away, and with it what was fastest."""
    forms(slow=slow, fast=swiglu)
    assert choose(build(), tmp_path).measured_now
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert choose(build(), tmp_path).measured_now


def test_what_the_compiler_builds_for_itself_is_not_counted(
    forms: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow machine its headers alone took the ten seconds that the quickstart gives."""
    forms(slow=slow, fast=swiglu)
    clock, headers = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(headers))
    monkeypatch.setattr(kernel_optimizer, "_start_compilers", lambda work: headers.append(1000.0))
    choices = KernelOptimizer(build(), 2, 6, compile=False, seconds=500, cache_dir=tmp_path).optimize()
    assert {choice.op: choice.choice for choice in choices}["swiglu"] == "fast"
    assert len(headers) == 2, "it is started once for all ops"


def test_nothing_else_in_the_process_changes(tmp_path: Path) -> None:
    model, other = build(), build()
    before, generator = model.content_hash(), torch.get_rng_state()
    KernelOptimizer(model, 2, 6, compile=False, cache_dir=tmp_path).optimize()
    assert torch.equal(generator, torch.get_rng_state())
    assert model.content_hash() == before
    assert other.kernels == KernelChoices(), "choices belong to a model"
    assert copy.deepcopy(model).kernels == model.kernels


@pytest.mark.parametrize("op", list(REGIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 40])
def test_every_form_for_this_device_passes_its_own_check(op: str, dtype: torch.dtype, window: int) -> None:
    """At an odd length, with several query blocks; what the check is worth is tested above."""
    changes = {"sliding_window": window, "sliding_layers": (0, 1)} if window else {}
    work = build(qk_norm=bool(window), **changes).workload(2, 131, dtype == torch.bfloat16, False)
    trials = try_all(op, work, lambda _: None)
    assert not [
        trial for trial in trials if trial.excluded and trial.excluded.startswith(("wrong", "failed"))
    ]
    tried = [trial.relative_error for trial in trials if trial.relative_error is not None]
    assert tried
    assert all(error < LARGEST_ERROR[dtype] for error in tried)


def _forms_of_model(op: str) -> list[str]:
    work = build().workload(2, 131, False, False)
    return [name for name, form in CANDIDATES[op].items() if not form.unsuited(work)]


@pytest.mark.parametrize(("op", "form"), [(op, form) for op in CANDIDATES for form in _forms_of_model(op)])
def test_a_model_computes_the_same_with_every_form(op: str, form: str) -> None:
    activation = {"activation": "gelu_tanh"} if op == "geglu" else {}
    model = build(qk_norm=True, post_norms=True, sliding_window=9, sliding_layers=(1,), **activation)
    ids = torch.arange(2 * 132).view(2, 132) % 37
    results = []
    for kernels in (PLAIN, KernelChoices(**{**vars(PLAIN), op: form})):
        model.use_kernels(kernels)
        loss, num_correct = model.loss(ids[:, :-1], ids[:, 1:])
        results.append((loss, num_correct, *torch.autograd.grad(loss, list(model.parameters()))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"norm is 'fast', expected one of automatic, written out"):
        KernelChoices(norm="fast")
    with pytest.raises(InputError, match="batch_size is 0"):
        KernelOptimizer(build(), 0, 8, cache_dir=tmp_path)


def test_why_there_was_nothing_to_choose_from_is_said(tmp_path: Path) -> None:
    """Of each form that does not suit: a small batch is another matter than another device."""
    assert choose(build(), tmp_path).reason == "not measured: no other form suits (Triton: needs a GPU)"
