"""The seeded basis: a table that a 32-bit seed gives, so that nothing of it need be stored.

    basis[s, j, e] = -1 if idx number (s*256 + j)*g + e of the seed is 128 or more, else +1             (docs/format.md, "Seeded basis")

"idx number c" is FORMAT's hash of seeded idx. Signs are exact in every float type and on every machine, which a normal draw is not. Every
vector has mean square 1, as random_basis has on average. In the character GPT of docs/training-experiments.md signs, normal, orthogonal and one-hot
tables trained alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import BASIS_VECTORS, Layout
from .reference import seeded_idx


def seeded_basis(layout: str | Layout, seed: int) -> Tensor:
    """float32 [M, 256, g] of -1 and +1 on the CPU. ValueError or TypeError: no layout, or a seed outside 0 .. 2^32 - 1."""
    from .arguments import seed_value

    layout = Layout.parse(layout)
    drawn = seeded_idx(1, layout.stages * BASIS_VECTORS * layout.group, 1, seed_value(seed), device=torch.device("cpu"))
    return torch.where(drawn >= 128, -1.0, 1.0).to(torch.float32).view(layout.basis_shape)


def basis_seed_of(basis: Tensor, layout: Layout, seed: Tensor | None) -> int | None:
    """The seed, where one is given and the table still is what it gives; None where the table has to be stored."""
    if seed is None or seed.is_meta or basis.is_meta:
        return None
    number = int(seed)
    return number if 0 <= number < 2**32 and torch.equal(basis.detach().cpu(), seeded_basis(layout, number)) else None
