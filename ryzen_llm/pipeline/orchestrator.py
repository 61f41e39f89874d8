"""The five phases of a run, and what happens when one of them fails."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from ryzen_callbacks import Claim, OptimizationValidator, ValidationReport, write_json
from torch import Tensor

from ryzen_llm.claims import ClaimContext, build_claims
from ryzen_llm.decoding import Generator
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained
from ryzen_llm.kernels import PLAIN, describe_device
from ryzen_llm.model import Transformer
from ryzen_llm.pipeline.config import RunConfig
from ryzen_llm.pipeline.html_report import write_html_report
from ryzen_llm.pipeline.output_dir import claim_output_dir
from ryzen_llm.pipeline.report import Accuracy, Component, FinalReport, Kernels, Phase
from ryzen_llm.pipeline.screen import show_summary
from ryzen_llm.pipeline.training import (
    CHECKPOINTS,
    CONFIG,
    TENSORBOARD,
    TRAINING_REPORT,
    build_trainer,
    train,
)
from ryzen_llm.selftest import IntegrationTestReport, IntegrationTestRunner
from ryzen_llm.training import (
    KernelOptimizer,
    LanguageModule,
    check_resumable,
    choose_precision,
    newest_checkpoint,
)

VALIDATION_REPORT = "validation_report.json"
TEST_REPORT = "integration_test_report.json"
FINAL_REPORT = "phase2_final_report.json"
HTML_REPORT = "report.html"
_SAMPLE_TOKENS = 120


@dataclass
class Orchestrator:
    """Runs setup, training, validation, testing and reporting for one configuration.

    Setup changes nothing on disk but the token cache until everything given has been checked, so that bad
    input leaves nothing half-written. A later phase that fails is reported, the phases that need it are
    skipped, and the reporting phase still runs.
    """

    config: RunConfig
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.config.options.output_dir).expanduser().absolute()
        self.phases: list[Phase] = []
        self.validation: ValidationReport | None = None
        self.tests: IntegrationTestReport | None = None
        self.kernels = Kernels(reason="setup did not finish")
        self.accuracy = Accuracy(reason="training did not finish")
        self.sample: str | None = None
        # Under DDP, Lightning starts this script once a process: the others train, this one does the rest.
        self._leads = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        self.console.quiet = not self._leads

    def run(self) -> FinalReport:
        """All phases; the report is also in the output directory.

        Raises InputError for bad configuration or input, found in setup.
        """
        with ExitStack() as held:
            self._set_up(held)
            self._phase("training", self._train, needs="setup")
            if not self._leads:
                return self._final_report()
            self._phase("validation", self._validate, needs="training")
            self._phase("testing", self._test, needs="training")
            return self._report()

    def _set_up(self, held: ExitStack) -> None:
        started = time.perf_counter()
        self.console.rule("setup")
        options, data = self.config.options, self.config.data
        if not data.val_fraction:
            raise InputError("data.val_fraction is 0, expected more: claims are measured on that text")
        device = _device(self.config.trainer.get("accelerator", "auto"))
        precision, why = choose_precision(self.config.trainer.get("precision"), device)
        seed_everything(options.seed, verbose=False)
        flops_per_token, what = self._build()
        try:
            self.trainer: Trainer = build_trainer(self.config, self.output_dir, precision, flops_per_token)
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}") from error
        if self._leads:
            held.enter_context(claim_output_dir(self.output_dir, options.resume))
        self.resume_from = newest_checkpoint(self.output_dir / CHECKPOINTS) if options.resume else None
        if self.resume_from:
            self._check_resumable(self.resume_from)
        if options.resume:
            where = (
                f"from {self.resume_from.name}" if self.resume_from else "from the start: no checkpoint yet"
            )
            self.console.print(f"resuming {where}")
        self.console.print(
            f"{escape(what)}; {device.type} ({why}): {precision}; "
            f"torch.compile {'on' if options.compile else 'off'}"
        )
        self._choose_kernels(device, precision)
        if self._leads:
            for name in (VALIDATION_REPORT, TEST_REPORT, FINAL_REPORT, HTML_REPORT):
                (self.output_dir / name).unlink(missing_ok=True)  # of the attempt that this one goes on from
        self.phases.append(Phase(name="setup", status="done", duration_s=time.perf_counter() - started))

    def _choose_kernels(self, device: torch.device, precision: str) -> None:
        """Have the model use the forms of its ops that are fastest here."""
        self.kernels = Kernels(device=describe_device(device))
        self.console.print(escape(str(self.kernels.device)))
        if not self.config.optimizations.enable_kernel_optimization:
            self.kernels.reason = "switched off by enable_kernel_optimization: false"
            self.module.model.use_kernels(PLAIN)
            return
        optimizer = KernelOptimizer(
            self.module.model,
            self.config.data.batch_size,
            self.config.data.context,
            bf16=precision == "bf16-mixed",
            compile=self.config.options.compile,
            device=device,
            cache_dir=self.config.data.cache_dir,
        )
        with self.console.status("measuring kernels") as status:
            self.kernels.choices = optimizer.optimize(
                lambda op, done, total: status.update(f"measuring kernels: {op} ({done + 1} of {total})")
            )
        chosen = ", ".join(f"{choice.op}: {choice.choice}" for choice in self.kernels.choices)
        self.console.print(f"kernels: {escape(chosen)}")

    def _build(self) -> tuple[int | None, str]:
        """Make what is trained and its data; returns FLOPs a token, and both in words."""
        data = self.config.data
        initial = self._initial_model()
        data.prepare_data()
        self.module = LanguageModule(
            initial or self.config.model_config(data.tokenizer.vocab_size),
            self.config.optimizer,
            compile=self.config.options.compile,
            checkpoint_activations=self.config.options.checkpoint_activations,
        )
        model = self.module.model
        return model.flops_per_token(data.context), (
            f"{data.store.corpus}: {data.num_tokens('train'):,} training tokens; "
            f"model {self.config.model_name} with {model.num_parameters():,} parameters"
        )

    def _initial_model(self) -> Transformer | None:
        """The model to start from, whose tokenizer becomes that of the data; None where none is given."""
        path = self.config.init_from
        if path is None:
            return None
        model, self.config.data.given_tokenizer = load_pretrained(path)
        self.config.check_initial(path, model.config)
        return model

    def _check_resumable(self, checkpoint: Path) -> None:
        check_resumable(checkpoint, self.module.model.config, self.config.data)

    def _phase(self, name: str, work: Callable[[], None], needs: str) -> None:
        needed = next(phase for phase in self.phases if phase.name == needs)
        if needed.status != "done":
            self.phases.append(
                Phase(name=name, status="skipped", duration_s=None, error=f"{needs} {needed.status}")
            )
            return
        self.console.rule(name)
        started = time.perf_counter()
        status: Literal["done", "failed", "interrupted"] = "done"
        error = None
        try:
            work()
        except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into SystemExit
            status, error = "interrupted", "interrupted"
        except Exception as caught:
            if name == "training" and isinstance(caught, InputError):
                raise  # the checkpoint to resume from does not fit the data
            status, error = "failed", traceback.format_exc()
            self.console.print(f"[red]{name} failed:[/red] {escape(str(caught))}")
        self.phases.append(
            Phase(name=name, status=status, duration_s=time.perf_counter() - started, error=error)
        )

    def _train(self) -> None:
        data = self.config.data
        initial_val_loss = None
        if self.config.init_from and not self.resume_from:
            (measured,) = self.trainer.validate(self.module, datamodule=data, verbose=False)
            initial_val_loss = measured["val_loss"]
            self.console.print(f"validation loss before training: {initial_val_loss:.3f} nats per token")
        train(self.trainer, self.module, data, self.resume_from)
        if "val_loss" not in self.trainer.callback_metrics:  # a finished run, resumed: nothing was left to do
            self.trainer.validate(self.module, datamodule=data, verbose=False)
        final = self.trainer.callback_metrics
        not_measured = (
            "the run was resumed" if self.config.init_from else "training started from random weights"
        )
        self.accuracy = Accuracy(
            val_loss=float(final["val_loss"]),
            val_accuracy=float(final["val_accuracy"]),
            unigram_entropy=data.store.unigram_entropy,
            initial_val_loss=initial_val_loss,
            reason=f"initial_val_loss: {not_measured}" if initial_val_loss is None else None,
        )
        model = self._trained_model()
        prompt = torch.tensor(data.tokenizer.encode_prompt(self.config.options.prompt))
        room = model.config.max_position_embeddings - len(prompt)
        generation = Generator(model).generate(
            prompt, max_new_tokens=min(_SAMPLE_TOKENS, room), temperature=0.7, top_p=0.9, seed=0
        )
        self.sample = data.tokenizer.decode(generation.ids[0].tolist())

    def _trained_model(self) -> Transformer:
        """The trained weights in a model that is not compiled."""
        model = Transformer(self.module.model.config, self.module.model.kernels)
        model.load_state_dict(self.module.model.state_dict())
        return model.eval()

    def _batches(self, split: Literal["train", "val"], count: int) -> list[Tensor]:
        data = self.config.data
        if split == "train":
            return list(islice(data.train_dataloader(), count))
        return [batch for loader in data.val_dataloader() for batch in islice(loader, count)]

    def _claims(self) -> list[Claim]:
        return build_claims(self._claim_context(self._trained_model()))

    def _claim_context(self, model: Transformer) -> ClaimContext:
        return ClaimContext(
            model=model,
            train_batches=self._batches("train", 2),
            val_batches=self._batches("val", 8),
            precision=str(self.trainer.precision),
            compile=self.config.options.compile,
            device=self.module.device,
            thresholds=self.config.thresholds,
            enabled=self.config.optimizations,
        )

    def _validate(self) -> None:
        with Progress(console=self.console, transient=True) as progress:
            bars: dict[str, TaskID] = {}

            def on_progress(name: str, done: int, total: int) -> None:
                if name not in bars:
                    bars[name] = progress.add_task(name, total=total)
                progress.update(bars[name], completed=done, total=total)

            validator = OptimizationValidator(
                self._claims(),
                path=self.output_dir / VALIDATION_REPORT,
                rounds=self.config.options.validation_rounds,
                on_progress=on_progress,
            )
            self.validation = validator.validate()

    def _self_tests(self) -> IntegrationTestRunner:
        return IntegrationTestRunner(
            self._trained_model(),
            self.config.data.tokenizer,
            self._batches("val", 1),
            self.output_dir / TRAINING_REPORT,
        )

    def _test(self) -> None:
        runner = self._self_tests()
        with Progress(console=self.console, transient=True) as progress:
            bar = progress.add_task("self-tests")
            self.tests = runner.run(
                self.output_dir / TEST_REPORT,
                lambda _, done, total: progress.update(bar, completed=done, total=total),
            )

    def _report(self) -> FinalReport:
        started = time.perf_counter()
        report = self._final_report()
        reporting = report.phases[-1]
        try:
            write_html_report(
                self.output_dir / HTML_REPORT, report, self.validation, self.output_dir / TRAINING_REPORT
            )
        except Exception as caught:
            reporting.status, reporting.error = "failed", traceback.format_exc()
            report.status = "failed"
            del report.artifacts["html"]
            self.console.print(f"[red]reporting failed:[/red] {escape(str(caught))}")
        reporting.duration_s = time.perf_counter() - started
        write_json(self.output_dir / FINAL_REPORT, report.model_dump())
        show_summary(self.console, report, self.output_dir)
        return report

    def _final_report(self) -> FinalReport:
        results = self.validation.results if self.validation else []
        components = {
            result.name: Component(
                status=result.status,
                measured=result.measured,
                ci_low=result.ci_low,
                ci_high=result.ci_high,
                threshold=result.threshold,
                message=result.message,
            )
            for result in results
        }
        statuses = {phase.status for phase in self.phases}
        status: Literal["done", "failed", "interrupted"] = "done"
        if "failed" in statuses:
            status = "failed"
        elif "interrupted" in statuses:
            status = "interrupted"
        names = {
            "training": TRAINING_REPORT,
            "validation": VALIDATION_REPORT,
            "tests": TEST_REPORT,
            "html": HTML_REPORT,
            "tensorboard": TENSORBOARD,
            "checkpoints": CHECKPOINTS,
            "config": CONFIG,
        }
        return FinalReport(
            status=status,
            phases=[*self.phases, Phase(name="reporting", status="done", duration_s=None)],
            optimizations=components,
            kernels=self.kernels,
            e2e_speedup=components.get("end_to_end"),
            accuracy=self.accuracy,
            tests=self.tests.summary.model_dump() if self.tests else None,
            sample=self.sample,
            recommendations=_recommendations(components),
            artifacts={
                key: name for key, name in names.items() if key == "html" or (self.output_dir / name).exists()
            },
        )


def _recommendations(components: dict[str, Component]) -> list[str]:
    """What the verdicts say to do; nothing where nothing was measured."""
    advice = {
        "FAIL": "{name} misses its threshold here: {message}",
        "WARNING": "{name} is inconclusive here; more rounds (--validation_rounds) on a "
        "quiet machine may settle it",
    }
    return [
        advice[component.status].format(name=name, message=component.message)
        for name, component in components.items()
        if component.status in advice
    ]


def _device(accelerator: str) -> torch.device:
    """The device that Lightning will choose, for deciding on the precision before there is a Trainer."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
