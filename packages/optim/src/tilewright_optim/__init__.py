"""Optimizers and learning-rate schedules for LLM training, in Triton and in torch.optim's terms.

On CUDA devices one kernel launch updates all tensors of a parameter group in one pass over memory;
elsewhere the plain-torch definition runs. State dicts are torch.optim's.
"""

from tilewright_optim.adam import Adam
from tilewright_optim.adamw import AdamW
from tilewright_optim.clip_grad import clip_grad_norm_
from tilewright_optim.functional import adam_reference, adamw_reference
from tilewright_optim.muon import Muon
from tilewright_optim.muon_functional import muon_reference
from tilewright_optim.muonw import MuonW
from tilewright_optim.newton_schulz import newton_schulz, newton_schulz_reference
from tilewright_optim.schedule import WarmupCosine, get_schedule

__all__ = [
    "Adam",
    "AdamW",
    "Muon",
    "MuonW",
    "WarmupCosine",
    "adam_reference",
    "adamw_reference",
    "clip_grad_norm_",
    "get_schedule",
    "muon_reference",
    "newton_schulz",
    "newton_schulz_reference",
]
