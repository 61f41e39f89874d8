"""Runs the checks through pytest, in this process, on the trained model."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer
from ryzen_llm.selftest.plugin import OnProgress, ResultPlugin
from ryzen_llm.selftest.report import CATEGORIES, IntegrationTestReport
from ryzen_llm.selftest.trained import Trained

CHECKS = Path(__file__).with_name("checks")


class IntegrationTestRunner:
    """Runs the checks in `checks/` on a trained model.

    Args:
        model: The trained model, fp32, not compiled; it is left as it is.
        tokenizer: Its tokenizer.
        val_batches: Token ids of the validation split, (batch, context + 1) int64 each.
        training_report: training_metrics_report.json of the run, if there is one.
        precision: Of the run: "bf16-mixed" or "32-true".
        checks: Folder with the files of checks, one a category: unit.py, integration.py, end_to_end.py,
            performance.py; those that are missing are left out.

    Raises InputError for no batches, or no file of checks.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        val_batches: Sequence[Tensor],
        training_report: Path | None = None,
        precision: str = "32-true",
        checks: Path = CHECKS,
    ) -> None:
        if not val_batches:
            raise InputError("val_batches is empty, expected at least one batch for the self-tests")
        files = [checks / f"{category}.py" for category in CATEGORIES]
        self.files = [file for file in files if file.is_file()]
        if not self.files:
            raise InputError(f"no checks in {checks}, expected some of {', '.join(f.name for f in files)}")
        self.trained = Trained(model, tokenizer, val_batches, training_report, precision)

    def run(self, path: Path | None = None, on_progress: OnProgress | None = None) -> IntegrationTestReport:
        """Run every check, write the report to `path` if given, and return it.

        `on_progress` is called with (check's name, checks done, checks in all) after each.

        Raises RuntimeError, with pytest's output, where pytest itself failed.
        """
        plugin = ResultPlugin(self.trained, on_progress)
        # The user's own pytest settings are for other tests than these: no ini file, no options, no plugins.
        isolated = {"PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        options = [
            *("-q", "-c", os.devnull, "--rootdir", str(self.files[0].parent)),
            *("-o", "python_files=*.py", "--import-mode=importlib", "--continue-on-collection-errors"),
            # Capturing file descriptors would swallow a progress bar, too.
            *("--capture=sys", "-p", "no:cacheprovider", "-p", "no:faulthandler"),
        ]
        output = io.StringIO()
        started = time.perf_counter()
        with (
            tempfile.TemporaryDirectory() as temporary,
            patch.dict(os.environ, isolated),
            contextlib.redirect_stdout(output),
        ):
            options.append(f"--basetemp={temporary}/pytest")  # pytest's own would be left there
            code = pytest.main([*options, *map(str, self.files)], plugins=[plugin])
        # pytest would take another folder's file of the same name for the one it has imported already.
        files = {str(file.resolve()) for file in self.files}
        for name in [n for n, m in list(sys.modules.items()) if getattr(m, "__file__", None) in files]:
            del sys.modules[name]
        if isinstance(plugin.interrupted, KeyboardInterrupt):
            raise plugin.interrupted
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(
                f"the self-tests could not run, pytest ended with {code}:\n{output.getvalue()}"
            )
        report = IntegrationTestReport.of(plugin.results, time.perf_counter() - started)
        if path is not None:
            report.write(path)
        return report
