"""The engine: score machines over a patch database, and a thin sampler on top."""

from els.engine.machines import ScoreMachine
from els.engine.posterior import LocalPosterior, PosteriorState, merge
from els.engine.sampler import sample

__all__ = ["LocalPosterior", "PosteriorState", "ScoreMachine", "merge", "sample"]
