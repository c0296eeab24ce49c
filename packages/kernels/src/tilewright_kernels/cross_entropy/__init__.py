"""Cross-entropy of logits and class indices, with label smoothing, z-loss and logit softcap.

Read in this order: `reference` (the definition), `kernels`, `launches` (tiles, registration,
gradient), `functional` (the public function), `module`.
"""

from tilewright_kernels.cross_entropy.functional import cross_entropy
from tilewright_kernels.cross_entropy.module import CrossEntropyLoss
from tilewright_kernels.cross_entropy.reference import cross_entropy_reference

__all__ = ["CrossEntropyLoss", "cross_entropy", "cross_entropy_reference"]
