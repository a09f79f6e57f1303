"""Score machines in the forms that other libraries call."""

from els.engine.adapters.diffusers import ELSModel, ModelConfig, ModelOutput, trained_betas
from els.engine.adapters.edm import EDMDenoiser

__all__ = ["EDMDenoiser", "ELSModel", "ModelConfig", "ModelOutput", "trained_betas"]
