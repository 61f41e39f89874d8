"""Lightning callbacks that collect metrics, detect anomalies and measure claimed optimisations."""

from ryzen_callbacks.anomaly import Anomaly
from ryzen_callbacks.atomic_file import write_json
from ryzen_callbacks.claim import Claim
from ryzen_callbacks.collector import TrainingMetricsCollector
from ryzen_callbacks.detector import AnomalyDetector
from ryzen_callbacks.environment import describe_environment
from ryzen_callbacks.flops import count_flops
from ryzen_callbacks.reports import TrainingMetricsReport, ValidationReport, ValidationResult
from ryzen_callbacks.running_statistics import RunningStatistics
from ryzen_callbacks.validator import OptimizationValidator

__all__ = [
    "Anomaly",
    "AnomalyDetector",
    "Claim",
    "OptimizationValidator",
    "RunningStatistics",
    "TrainingMetricsCollector",
    "TrainingMetricsReport",
    "ValidationReport",
    "ValidationResult",
    "count_flops",
    "describe_environment",
    "write_json",
]
