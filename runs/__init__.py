"""Runs: folders of samples that can be interrupted at any moment and resumed."""

from els.runs.folder import GRID_MOST, RunFolder, read_sessions, read_settings
from els.runs.run import RunReport, StepProgress, sample_run
from els.runs.settings import EstimateSource, RunSettings
from els.runs.stores import RunError

__all__ = [
    "GRID_MOST",
    "EstimateSource",
    "RunError",
    "RunFolder",
    "RunReport",
    "RunSettings",
    "StepProgress",
    "read_sessions",
    "read_settings",
    "sample_run",
]


def __dir__() -> list[str]:
    return sorted(__all__)
