"""The five phases of a run, and what happens when one of them fails."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from ryzen_llm.kernels import PLAIN, describe_device, supports_bf16
from ryzen_llm.model import Transformer
from ryzen_llm.pipeline.config import RunConfig
from ryzen_llm.pipeline.earlier import Earlier, read_earlier
from ryzen_llm.pipeline.models import load_model, model_to_measure
from ryzen_llm.pipeline.output_dir import claim_output_dir
from ryzen_llm.pipeline.pages import (
    RunResults,
    read_training_report,
    write_html_report,
    write_markdown_report,
)
from ryzen_llm.pipeline.parts import chosen_parts
from ryzen_llm.pipeline.recommendations import recommend
from ryzen_llm.pipeline.report import Accuracy, Component, FinalReport, Kernels, Phase
from ryzen_llm.pipeline.screen import show_parts, show_summary
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
    whole_state_dict,
)

VALIDATION_REPORT = "validation_report.json"
TEST_REPORT = "integration_test_report.json"
FINAL_REPORT = "phase2_final_report.json"
HTML_REPORT = "report.html"
MARKDOWN_REPORT = "report.md"
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

    kind: ClassVar[str] = "model"
    """What is trained, as `read_checkpoint` calls it."""

    def __post_init__(self) -> None:
        self.output_dir = Path(self.config.options.output_dir).expanduser().absolute()
        self.phases: list[Phase] = []
        self.validation: ValidationReport | None = None
        self.tests: IntegrationTestReport | None = None
        self.kernels = Kernels(reason="setup did not finish")
        self.accuracy = Accuracy(reason="training did not finish")
        self.sample: str | None = None
        self.checkpoint: str | None = None
        self.earlier = Earlier()
        # Under DDP, Lightning starts this script once a process: the others train, this one does the rest.
        self._leads = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        self.console.quiet = not self._leads

    def run(self) -> FinalReport:
        """All phases; the report is also in the output directory.

        Raises InputError for bad configuration or input, found in setup.
        """
        with ExitStack() as held:
            self._set_up(held)
            self._phase("training", self._train)
            if not self._leads:
                return self._final_report()
            self._phase("validation", self._validate)
            self._phase("testing", self._test)
            return self._report()

    def _set_up(self, held: ExitStack) -> None:
        started = time.perf_counter()
        self.console.rule("setup")
        options, data = self.config.options, self.config.data
        if not data.val_fraction:
            raise InputError("data.val_fraction is 0, expected more: claims are measured on that text")
        # The module's own will not do: Lightning moves it to the CPU when training is over.
        self.device = device = _device(self.config.trainer.get("accelerator", "auto"))
        precision, why = choose_precision(self.config.trainer.get("precision"), device)
        trains = options.runs("training")
        seed_everything(options.seed, verbose=False)
        flops_per_token, what = self._build()
        self._check_prompt()
        try:
            self.trainer: Trainer = build_trainer(self.config, self.output_dir, precision, flops_per_token)
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}") from error
        if self._leads:
            held.enter_context(claim_output_dir(self.output_dir, keep=options.resume or not trains))
        resumes = options.resume and trains
        self.resume_from = newest_checkpoint(self.output_dir / CHECKPOINTS, self.kind) if resumes else None
        if self.resume_from:
            self._check_resumable(self.resume_from)
        if resumes:
            where = (
                f"from {self.resume_from.name}" if self.resume_from else "from the start: no checkpoint yet"
            )
            self.console.print(f"resuming {where}")
        self.console.print(
            f"{escape(what)}; {device.type} ({why}): {precision}; "
            f"torch.compile {'on' if options.compile else 'off'}"
        )
        self._choose_parts(device, precision)
        if self._leads:
            self._clear_reports()
        self.phases.append(Phase(name="setup", status="done", duration_s=time.perf_counter() - started))

    def _choose_parts(self, device: torch.device, precision: str) -> None:
        """Choose what is not chosen yet, and show everything that is."""
        self._choose_kernels(device, precision)
        show_parts(
            self.console,
            chosen_parts(self.module.model.config, self.config.optimizations, self.kernels),
        )

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
            seconds=self.config.options.kernel_seconds,
            cache_dir=self.config.data.cache_dir,
        )
        with self.console.status("measuring kernels") as status:
            self.kernels.choices = optimizer.optimize(
                lambda op, done, total: status.update(f"measuring kernels: {op} ({done + 1} of {total})")
            )

    def _build(self) -> tuple[int | None, str]:
        """Make what is trained and its data; returns FLOPs a token, and both in words."""
        data = self.config.data
        trains = self.config.options.runs("training")
        if trains:
            initial = load_model(self.config, self.config.init_from) if self.config.init_from else None
        else:
            initial, self.checkpoint = model_to_measure(self.config, self.output_dir)
            self.accuracy = Accuracy(reason="neither training nor validation is in --phases")
        data.prepare_data()
        self.module = LanguageModule(
            initial or self.config.model_config(data.tokenizer.vocab_size),
            self.config.optimizer,
            compile=self.config.options.compile and trains,
            checkpoint_activations=self.config.options.checkpoint_activations,
            document_separator=data.tokenizer.end_of_text_id if self.config.options.mask_documents else None,
        )
        model = self.module.model
        self.weights = model.state_dict()
        return model.flops_per_token(data.context), (
            f"{data.store.corpus}: {data.num_tokens('train'):,} training tokens; "
            f"model {self.config.model_name} with {model.num_parameters():,} parameters"
        )

    def _check_prompt(self) -> None:
        """Raise InputError where the sample at the end could not be written."""
        tokens = len(self.config.data.tokenizer.encode_prompt(self.config.options.prompt))
        most = self.module.model.config.max_position_embeddings
        if not 0 < tokens < most:
            raise InputError(
                f"prompt has {tokens} tokens, expected 1 to {most - 1}, one less than the model's "
                "max_position_embeddings: give another --prompt"
            )

    def _check_resumable(self, checkpoint: Path) -> None:
        check_resumable(checkpoint, self.module.model.config, self.config.data, self.config.optimizer)

    def _clear_reports(self) -> None:
        """Remove the reports of an earlier call, so that they are not taken for this one's.

        Without training, those that are about the same weights and that this call does not make anew stay.
        """
        options = self.config.options
        final, validation, tests = (
            self.output_dir / name for name in (FINAL_REPORT, VALIDATION_REPORT, TEST_REPORT)
        )
        if self.checkpoint is not None:
            self.earlier = read_earlier(final, validation, tests, self.checkpoint)
        kept: set[Path] = set()
        if self.earlier.final is not None:
            self.accuracy, self.sample = self.earlier.final.accuracy, self.earlier.final.sample
            if not options.runs("validation"):
                self.validation = self.earlier.validation
                kept.add(validation)
            if not options.runs("testing"):
                self.tests = self.earlier.tests
                kept.add(tests)
        pages = (self.output_dir / name for name in (HTML_REPORT, MARKDOWN_REPORT))
        for path in {final, validation, tests, *pages} - kept:
            path.unlink(missing_ok=True)

    def _phase(self, name: str, work: Callable[[], None]) -> None:
        options = self.config.options
        if not options.runs(name):
            self.phases.append(self.earlier.phase(name))
            return
        # The model comes from training, or from a checkpoint, which setup has read.
        training = next((phase for phase in self.phases if phase.name == "training"), None)
        if training is not None and options.runs("training") and training.status != "done":
            self.phases.append(
                Phase(name=name, status="skipped", duration_s=None, error=f"training {training.status}")
            )
            return
        self.console.rule(name)
        started = time.perf_counter()
        status: Literal["done", "failed", "interrupted"] = "done"
        error = None
        try:
            work()
        except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into SystemExit
            again = "--resume goes on from the last checkpoint, if there is one"
            measured = f"--phases {name} measures it again"
            status, error = "interrupted", f"by a signal; {again if name == 'training' else measured}"
        except Exception as caught:
            if name == "training" and self.checkpoint is None and isinstance(caught, InputError):
                raise  # the checkpoint to resume from does not fit the data
            status, error = "failed", traceback.format_exc()
            message = " ".join([str(caught), *getattr(caught, "__notes__", [])])
            self.console.print(f"[red]{name} failed:[/red] {escape(message)}")
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
        try:
            self.checkpoint = train(self.trainer, self.module, data, self.resume_from)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # PyTorch names a worker that is gone, unless its pipe breaks before its end is noticed.
            broken_pipe = isinstance(error, (ConnectionError, EOFError))
            if data.num_workers and (broken_pipe or "DataLoader worker" in str(error)):
                error.add_note(
                    "A DataLoader worker was probably ended from outside, as is done for want of memory: "
                    "go on from the last checkpoint with --resume, or with fewer data.num_workers."
                )
            elif self.trainer.world_size > 1:  # the error does not say which process is gone
                error.add_note(
                    f"One of the {self.trainer.world_size} processes may have ended: see what it printed, "
                    "and go on from the last checkpoint with --resume."
                )
            raise
        self.weights = whole_state_dict(self.module.model)  # by all processes together
        not_measured = (
            "the run was resumed" if self.config.init_from else "training started from random weights"
        )
        if self._leads:
            self._evaluate(initial_val_loss, not_measured)

    def _evaluate(self, initial_val_loss: float | None, not_measured: str) -> None:
        """Take the validation loss that the Trainer has just measured, and a sample of the model's text."""
        data, final = self.config.data, self.trainer.callback_metrics
        if not math.isfinite(final["val_loss"]):
            raise RuntimeError(
                f"the validation loss is {float(final['val_loss'])}, the weights are of no use; "
                f"{TRAINING_REPORT} has the step where it began: lower the learning rate or look at its data"
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
        # Without bf16 arithmetic, setup has said so.
        weights = "bf16" if supports_bf16(next(model.parameters()).device) else "fp32"
        generation = Generator(model, weights=weights).generate(
            prompt, max_new_tokens=min(_SAMPLE_TOKENS, room), temperature=0.7, top_p=0.9, seed=0
        )
        self.sample = data.tokenizer.decode(generation.ids[0].tolist())

    def _trained_model(self) -> Transformer:
        """The trained weights in a model that is not compiled."""
        model = Transformer(self.module.model.config, self.module.model.kernels)
        model.load_state_dict(self.weights)
        model.document_separator = self.module.model.document_separator
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
            device=self.device,
            thresholds=self.config.thresholds,
            enabled=self.config.optimizations,
            optimizer=self.config.optimizer,
            twin_batches=self._batches("train", self.config.options.twin_steps),
        )

    def _validate(self) -> None:
        if not self.config.options.runs("training"):
            self.trainer.loggers = []  # the curves are training's
            self.trainer.validate(self.module, datamodule=self.config.data, verbose=False)
            self._evaluate(None, "this call did not train")
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
        # One of this run is named relative to output_dir; another's training report is not here.
        from_elsewhere = self.checkpoint is not None and Path(self.checkpoint).is_absolute()
        return IntegrationTestRunner(
            self._trained_model(),
            self.config.data.tokenizer,
            self._batches("val", 1),
            None if from_elsewhere else self.output_dir / TRAINING_REPORT,
            str(self.trainer.precision),
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
            training = read_training_report(self.output_dir / TRAINING_REPORT)
            run = RunResults(report, self.validation, self.tests, training)
            write_html_report(self.output_dir / HTML_REPORT, run)
            write_markdown_report(self.output_dir / MARKDOWN_REPORT, run)
        except Exception as caught:
            reporting.status, reporting.error = "failed", traceback.format_exc()
            report.status = "failed"
            del report.artifacts["html"], report.artifacts["markdown"]
            self.console.print(f"[red]reporting failed:[/red] {escape(str(caught))}")
        reporting.duration_s = time.perf_counter() - started
        try:
            write_json(self.output_dir / FINAL_REPORT, report.model_dump())
        except OSError as error:  # a full disk: what was measured is on the screen at least
            report.status = "failed"
            self.console.print(f"[red]{FINAL_REPORT} cannot be written:[/red] {escape(str(error))}")
        show_summary(self.console, report, self.output_dir, self._to_generate() if self.checkpoint else ())
        return report

    def _to_generate(self) -> list[str]:
        """Options of generate.py for what was trained or measured."""
        assert self.checkpoint is not None
        elsewhere = Path(self.checkpoint).is_absolute()
        return ["--model", self.checkpoint if elsewhere else str(self.output_dir)]

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
        # Of this call: how training ended once is told in its phase, and no fault of a later one.
        ran = self.config.options.runs
        statuses = {phase.status for phase in self.phases if phase.name == "setup" or ran(phase.name)}
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
            "markdown": MARKDOWN_REPORT,
            "tensorboard": TENSORBOARD,
            "checkpoints": CHECKPOINTS,
            "config": CONFIG,
        }
        return FinalReport(
            status=status,
            checkpoint=self.checkpoint,
            phases=[*self.phases, Phase(name="reporting", status="done", duration_s=None)],
            optimizations=components,
            kernels=self.kernels,
            e2e_speedup=components.get("end_to_end"),
            accuracy=self.accuracy,
            tests=self._judged_tests(),
            sample=self.sample,
            recommendations=recommend(results, supports_bf16(self.device)),
            artifacts={
                key: name
                for key, name in names.items()
                if key in ("html", "markdown") or (self.output_dir / name).exists()
            },
        )

    def _judged_tests(self) -> dict[str, Any] | None:
        """How many self-tests came out how, and the verdict on that."""
        if self.tests is None:
            return None
        rate, threshold = self.tests.summary.pass_rate, self.config.thresholds.test_pass_rate_min
        status = "NOT_MEASURED" if rate is None else "PASS" if rate >= threshold else "FAIL"
        return {**self.tests.summary.model_dump(), "threshold": threshold, "status": status}


def _device(accelerator: str) -> torch.device:
    """The device that Lightning will choose, for deciding on the precision before there is a Trainer."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
