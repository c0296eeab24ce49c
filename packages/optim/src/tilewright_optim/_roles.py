"""Which of a model's parameters Muon is for, by what they do in the model.

Muon's steps are right for matrices that map one hidden space to another. An embedding's rows are
looked up one at a time, and the output layer's are one for each word, often of no gradient at all:
both do better with AdamW, as do vectors (norms, biases) and convolutions (Jordan et al. 2024).
"""

from collections.abc import Iterator
from typing import Literal

from torch import nn

Role = Literal["matrix", "embedding", "vector"]

HEADS = frozenset(("lm_head", "head", "output", "output_layer", "classifier", "unembed", "score"))
"""Names under which models keep their output layer."""

ROUTERS = frozenset(("router", "gate", "wg"))
"""Names of the layers that choose experts: small, and a row for each expert."""

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def roles(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Role]]:
    """Name, parameter and role of each parameter that is trained, shared ones once.

    A parameter is an embedding if it is that of an `nn.Embedding`, if it has such a one's shape and
    is the module's last matrix (an output layer that is not tied), or if its layer is named as in
    `HEADS` or `ROUTERS`; else a matrix if it has two dimensions or, for experts, three; else a
    vector, whatever its shape. Convolutions' weights are vectors, and so is a [1, A, B], which is
    one thing that is added (positions, a class token) and no experts.
    """
    embeddings = [
        m.weight for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    ]
    known = {id(weight) for weight in embeddings}
    matrices = [param for param in module.parameters() if param.ndim == 2]
    if matrices and matrices[-1].shape in {weight.shape for weight in embeddings}:
        known.add(id(matrices[-1]))
    kernels = {id(m.weight) for m in module.modules() if isinstance(m, _CONVOLUTIONS)}
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        layer = name.split(".")[-2:-1]
        added = param.ndim == 3 and param.shape[0] == 1
        if param.ndim not in (2, 3) or added or id(param) in kernels:
            yield name, param, "vector"
        elif id(param) in known or (HEADS | ROUTERS) & set(layer):
            yield name, param, "embedding"
        else:
            yield name, param, "matrix"
