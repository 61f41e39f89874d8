"""Choosing the fastest form of each op by measuring them here, once for a machine and a model's shape."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from ryzen_callbacks import describe_environment, write_json

import ryzen_llm.kernels
from ryzen_llm.data import default_cache_dir
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import AUTOMATIC, CANDIDATES, KernelChoices, Workload, shared_compilations
from ryzen_llm.kernels.regions import ops_of
from ryzen_llm.model import Transformer
from ryzen_llm.training.kernel_trials import OUT_OF_TIME, Trial, fastest, try_all


class OpChoice(BaseModel):
    """What was chosen for one op and every form that was tried; `reason` where nothing was measured."""

    model_config = ConfigDict(extra="forbid")

    op: str
    choice: str
    trials: list[Trial] = []
    measured_now: bool = False
    """False where the measurement of an earlier run was taken."""
    reason: str | None = None


class KernelOptimizer:
    """Measures the forms of each op of a model on its device and has the model use the fastest.

    Every form runs forward and backward among its neighbours in a block, compiled as the block is; it is
    checked against the plainest form in fp32 before it is timed, and left out with its reason where it is
    wrong, fails or runs out of memory. The choice is kept on disk by device, library versions, op, sizes and
    dtype, so that the next run takes it at once. Whatever happens here, the model stays trainable: an op that
    could not be measured is left to the rules of thumb.

    Args:
        model: The model. Only `optimize` changes it, and no weight.
        batch_size: Sequences of a training step.
        context: Tokens of each.
        bf16: Whether training runs under bf16 autocast.
        compile: Whether training compiles the blocks.
        device: Where it will train; if not given, where the model is.
        seconds: After these no other form is tried. Most of it is compiling, whose results the compiler's
            own cache keeps: an op that was not finished has the rules of thumb, and the next run goes on.
            What is built when it is first used on a machine, such as forms in C++ and the compiler's own
            precompiled headers, is not counted: training would have to wait for it too.
        cache_dir: Folder of the measurements; if not given, $RYZEN_LLM_CACHE or ~/.cache/ryzen_llm.

    Raises InputError for sizes below one.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        context: int,
        bf16: bool = False,
        compile: bool = True,
        device: torch.device | None = None,
        seconds: float = 15.0,
        cache_dir: Path | None = None,
    ) -> None:
        if batch_size < 1 or context < 1:
            raise InputError(f"batch_size is {batch_size} and context {context}, expected 1 or more of both")
        self.model = model
        compiled = compile and not torch._dynamo.config.disable  # TORCHDYNAMO_DISABLE=1
        self.workload = model.workload(batch_size, context, bf16, compiled, device)
        self.seconds = seconds
        self.folder = (cache_dir or default_cache_dir()) / "kernels"

    def optimize(self, on_op: Callable[[str, int, int], None] = lambda *_: None) -> list[OpChoice]:
        """Choose for every op, and have the model use the choices.

        `on_op` is called with (op, ops done, ops in all) before each. What is measured are forward and
        backward, also where the caller is in `torch.inference_mode()` or `torch.no_grad()`.
        """
        ops = ops_of(self.workload)
        self._deadline: float | None = None  # until the first op that has to be measured
        choices = []
        for done, op in enumerate(ops):
            on_op(op, done, len(ops))
            with torch.inference_mode(False), torch.enable_grad():
                choices.append(self._choose(op))
        self.model.use_kernels(KernelChoices(**{choice.op: choice.choice for choice in choices}))
        return choices

    def _choose(self, op: str) -> OpChoice:
        key = _key(op, self.workload)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{op}-{digest}.json"
        try:
            return _read(path, self.workload) or self._measure(op, key, path)
        except Exception as error:
            return OpChoice(op=op, choice=AUTOMATIC, reason=f"not measured: {type(error).__name__}: {error}")

    def _measure(self, op: str, key: dict[str, Any], path: Path) -> OpChoice:
        unsuited = {name: form.unsuited(self.workload) for name, form in CANDIDATES[op].items()}
        suited = [name for name, why in unsuited.items() if not why]
        if len(suited) == 1:
            others = ", ".join(f"{name}: {why}" for name, why in unsuited.items() if why)
            return OpChoice(op=op, choice=suited[0], reason=f"not measured: no other form suits ({others})")
        marker = path.with_suffix(".trying")
        with ExitStack() as held:
            writable = True
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(path.with_suffix(".lock")))
            except OSError as error:
                warnings.warn(f"{self.folder}: kernel choices are not kept ({error})", stacklevel=2)
                writable = False
            found = _read(path, self.workload) if writable else None
            if found:  # another process has measured it meanwhile
                return found
            fatal = marker.read_text(encoding="utf-8") if writable and marker.exists() else None

            def on_trial(name: str | None) -> None:
                if not writable:
                    return
                if name is None:
                    marker.unlink(missing_ok=True)
                else:
                    marker.write_text(name, encoding="utf-8")

            try:
                if self._deadline is None:
                    _start_compilers(self.workload)
                    self._deadline = time.perf_counter() + self.seconds
                trials = _quietly(op, self.workload, on_trial, fatal, self._deadline)
            finally:
                on_trial(None)
            complete = all(trial.excluded != OUT_OF_TIME for trial in trials)
            name = fastest(trials) if complete else None
            choice = OpChoice(
                op=op,
                choice=name or AUTOMATIC,
                trials=trials,
                measured_now=True,
                reason=None if name else "no form could be measured" if complete else OUT_OF_TIME,
            )
            if writable and name:
                write_json(path, {"key": key, "choice": choice.model_dump()})
            return choice


def _start_compilers(work: Workload) -> None:
    for op in ops_of(work):
        for form in CANDIDATES[op].values():
            form.unsuited(work)  # which compiles those in C++
    if work.compiled:
        with suppress(Exception):  # the trials say why nothing can be compiled
            torch.compile(torch.neg)(torch.zeros(64, device=work.device))


def _quietly(
    op: str, work: Workload, on_trial: Callable[[str | None], None], fatal: str | None, deadline: float
) -> list[Trial]:
    """Without a trace in the process: no compilation of the trials stays, no global generator moves."""
    devices = [work.device] if work.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), shared_compilations():
            return try_all(op, work, on_trial, fatal, deadline)
    finally:
        torch._dynamo.reset()
        if work.device.type == "cuda":
            torch.cuda.empty_cache()


def _read(path: Path, work: Workload) -> OpChoice | None:
    """The choice kept there, None where there is none or it cannot be used, or not here."""
    try:
        kept = OpChoice.model_validate(json.loads(path.read_text(encoding="utf-8"))["choice"])
        if CANDIDATES[kept.op][kept.choice].unsuited(work):  # the folder may be of several machines
            return None
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None  # measured again, and written anew
    return kept.model_copy(update={"measured_now": False})


def _key(op: str, work: Workload) -> dict[str, Any]:
    environment = describe_environment()
    triton = next((d.version for d in metadata.distributions(name="triton")), None)
    sizes = {name: str(value) for name, value in vars(work).items()}
    return {
        "op": op,
        "workload": sizes,
        "device": environment["device"] if work.device.type == "cuda" else environment["cpu"],
        "cpu_capability": environment["cpu_capability"],
        "threads": environment["threads"],
        "torch": environment["torch"],
        "cuda": environment["cuda"],
        "triton": triton,
        "python": environment["python"],
        "kernels": _digest_of_kernels(),
    }


def _digest_of_kernels() -> str:
    """Of the package's source, so that changed kernels are measured anew."""
    digest = hashlib.sha256()
    for file in sorted(Path(ryzen_llm.kernels.__file__).parent.iterdir()):
        if file.suffix in {".py", ".cpp", ".h"}:
            digest.update(file.read_bytes())
    return digest.hexdigest()
