"""The checks of the testing phase, run through pytest on the trained model."""

from ryzen_llm.selftest.report import IntegrationTestReport, TestResult, TestSummary
from ryzen_llm.selftest.runner import IntegrationTestRunner

__all__ = ["IntegrationTestReport", "IntegrationTestRunner", "TestResult", "TestSummary"]
