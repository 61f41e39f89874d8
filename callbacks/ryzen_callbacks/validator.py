"""The callback that measures claims and writes the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from ryzen_callbacks.batch_hooks import BATCH_HOOKS, leave_out
from ryzen_callbacks.claim import Claim
from ryzen_callbacks.environment import describe_environment
from ryzen_callbacks.measurement import measure_claim
from ryzen_callbacks.report_path import prepare_report_path, refuse_shared_path, why_not_writable
from ryzen_callbacks.reports import ValidationReport, ValidationResult
from ryzen_callbacks.verdict import figure_result

REPORT_NAME = "validation_report.json"


class OptimizationValidator(Callback):
    """Measures claims at the end of a fit, or by hand with `validate()`, and reports a verdict on each.

    Timed claims are measured in paired, interleaved rounds (A B B A, B A A B) with the baseline against
    itself as a control; see `ryzen_callbacks.paired` for the method and `Claim` for what can be claimed. PASS
    needs the whole 95% interval on the right side of the line, FAIL has it on the wrong side, WARNING is
    inconclusive.

    In a Trainer it runs in `on_train_end`, while the model is still on its device, on the global zero; the
    other ranks wait. To its own claims it adds those of the LightningModule's `optimization_claims()`, if
    there is one; if that raises, or two claims then share a name, there is a warning and it measures its own.

    Args:
        claims: what to measure. The order is kept.
        path: the JSON report; None: `validation_report.json` in the Trainer's log directory (by hand: none).
        rounds: rounds of four timings for a timed claim; below 6 there is no interval and no PASS. Fix it in
            advance: adding rounds until the verdict pleases makes the interval mean nothing.
        warmup: untimed runs of each arm first.
        control_limit: how wide the control's interval may be (high / low) before no verdict is better than
            WARNING.
        every_n_validations: also measure after every n-th validation; the latest report replaces the one
            before.
        on_progress: called with (claim's name, rounds done, rounds in all), for a progress bar; with 0 done
            before a claim's warm-up. A claim that is not timed has one round.

    Raises:
        ValueError: rounds below 1, negative warmup, a control limit of 1 or below, or two claims of one name.
    """

    def __init__(
        self,
        claims: Sequence[Claim] = (),
        path: str | Path | None = None,
        rounds: int = 12,
        warmup: int = 1,
        control_limit: float = 1.5,
        every_n_validations: int | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}, expected 1 or more (6 or more for an interval)")
        if warmup < 0:
            raise ValueError(f"warmup is {warmup}, expected 0 or more")
        if every_n_validations is not None and every_n_validations < 1:
            raise ValueError(f"every_n_validations is {every_n_validations}, expected 1 or more, or None")
        if not control_limit > 1:  # also where it is NaN
            raise ValueError(f"control_limit is {control_limit}, expected more than 1 (it is high / low)")
        self.claims = list(claims)
        _check_names(self.claims)
        self.path = Path(path) if path is not None else None
        self._destination = self.path
        self.rounds = rounds
        self.warmup = warmup
        self.control_limit = control_limit
        self.every_n_validations = every_n_validations
        self.on_progress = on_progress
        self._validations = 0
        leave_out(self, BATCH_HOOKS, Callback)
        self.report: ValidationReport | None = None
        """The latest report, once there is one."""

    def validate(self, claims: Sequence[Claim] | None = None) -> ValidationReport:
        """Measure `claims` (default: the validator's own), write the report if there is `path`, return it.

        Raises:
            ValueError: the report cannot be written, before anything is measured; two claims of one name.
        """
        if self.path is not None and (fault := why_not_writable(self.path)):
            raise ValueError(fault)
        return self._validate(self.claims if claims is None else list(claims), self.path)

    def _validate(self, claims: list[Claim], path: Path | None) -> ValidationReport:
        _check_names(claims)
        results = [self._measure(claim) for claim in claims]
        self.report = ValidationReport.of(results, describe_environment())
        if path is not None:
            self.report.write(path)
        return self.report

    def _measure(self, claim: Claim) -> ValidationResult:
        total = (claim.rounds or self.rounds) if claim.measure == "time" else 1

        def on_round(done: int, total: int = total) -> None:
            if self.on_progress is not None:
                self.on_progress(claim.name, done, total)

        on_round(0)
        result = measure_claim(claim, self.rounds, self.warmup, self.control_limit, on_round)
        if claim.measure != "time" or result.status == "NOT_MEASURED":
            on_round(total)
        return result

    # In a Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle where the report goes, and fail now rather than after training if it cannot go there."""
        if stage == "fit":
            _check_names(self.claims)
            self._destination = prepare_report_path(trainer, self.path, REPORT_NAME)
            refuse_shared_path(trainer, self, self._destination)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and report, if it is time to."""
        if self.every_n_validations is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            # Lightning validates in inference mode; an arm may want gradients.
            with torch.inference_mode(False), torch.enable_grad():
                self._measure_all(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and report."""
        self._measure_all(trainer, pl_module)

    def _measure_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            if trainer.is_global_zero:
                with isolate_rng():  # training goes on with the numbers it would have drawn
                    self._validate(self._with_claims_of(pl_module), self._destination)
        finally:  # whatever happened here, the other ranks are waiting
            trainer.strategy.barrier("OptimizationValidator")

    def _with_claims_of(self, pl_module: LightningModule) -> list[Claim]:
        from_module = getattr(pl_module, "optimization_claims", None)
        if not callable(from_module):
            return self.claims
        try:
            claims = [*self.claims, *from_module()]
            _check_names(claims)
        except Exception as error:  # training is over: its results are worth more than these claims
            reason = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"the claims of the module's optimization_claims() are not measured: {reason}")
            return self.claims
        return claims

    @property
    def state_key(self) -> str:
        """Under which name the state is in a checkpoint: other validators may be in the same Trainer."""
        return self._generate_state_key(claims=[claim.name for claim in self.claims], path=str(self.path))

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, for `every_n_validations`."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._validations = state_dict["validations"]

    # Figures measured by somebody else

    def validate_kernel_performance(
        self, actual: float, expected: float, tolerance: float = 0.05
    ) -> ValidationResult:
        """Verdict on the kernels' speed-up (x): PASS from `expected`, WARNING within the relative
        `tolerance`.

        Raises:
            ValueError: a figure that is not a finite number. So the other five.
        """
        return figure_result("kernel performance", "speedup", actual, expected, tolerance)

    def validate_embedding_compression(
        self, actual: float, expected: float, tolerance: float = 0.05
    ) -> ValidationResult:
        """Verdict on a compression ratio (dense bytes / compressed bytes)."""
        return figure_result("embedding compression", "ratio", actual, expected, tolerance)

    def validate_kv_cache(self, actual: float, expected: float, tolerance: float = 0.05) -> ValidationResult:
        """Verdict on the share of the cache's memory that is saved (0.25: a quarter)."""
        return figure_result("KV cache", "saving", actual, expected, tolerance)

    def validate_speculative_decoding(
        self, actual: float, expected: float, tolerance: float = 0.05
    ) -> ValidationResult:
        """Verdict on the speed-up of speculative over plain decoding (x)."""
        return figure_result("speculative decoding", "speedup", actual, expected, tolerance)

    def validate_end_to_end(
        self, actual: float, expected: float, tolerance: float = 0.05
    ) -> ValidationResult:
        """Verdict on the speed-up of everything together (x)."""
        return figure_result("end to end", "speedup", actual, expected, tolerance)

    def validate_numerical_correctness(
        self, actual: float, expected: float, tolerance: float = 0.05
    ) -> ValidationResult:
        """Verdict on a relative increase of the loss (0.01: 1%), which may be at most `expected`."""
        return figure_result("numerical correctness", "increase", actual, expected, tolerance)


def _check_names(claims: Sequence[Claim]) -> None:
    names = [claim.name for claim in claims]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two claims are named {name!r}; a report needs a name for each")
