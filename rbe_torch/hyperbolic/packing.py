"""Several texts in one window of tokens. Names are five tokens long and the longest of a batch sixteen: a row each would be two thirds
padding, windows of 64 are full to 1 or 2 %. A token sees the tokens of its own text alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 64


def pack(ids: Tensor, lengths: Tensor, width: int = WIDTH) -> dict[str, Tensor]:
    """ids: int64 [N, longest], of which lengths [N] are tokens. What HbBertModel is called with: input_ids, position_ids and owner, the
    text that a token belongs to or -1, each [windows, width or, if that is more, longest]. Longest first, each into the fullest window that
    has room."""
    width = max(width, ids.shape[1])
    fits: dict[int, list[int]] = {}  # windows by their room
    start, count = [0] * len(lengths), 0
    size = lengths.tolist()
    for text in lengths.argsort(descending=True, stable=True).tolist():
        need = size[text]
        room = next((room for room in range(need, width) if fits.get(room)), width)
        window = fits[room].pop() if room < width else count
        count += window == count
        start[text] = window * width + width - room
        fits.setdefault(room - need, []).append(window)
    inside = torch.arange(ids.shape[1]) < lengths[:, None]
    at = (torch.tensor(start)[:, None] + torch.arange(ids.shape[1]))[inside]
    owner = torch.full((count * width,), -1).index_copy_(0, at, torch.arange(len(lengths)).repeat_interleave(lengths))
    tokens, positions = torch.zeros(2, count * width, dtype=torch.int64)
    tokens[at], positions[at] = ids[inside], torch.arange(ids.shape[1]).expand_as(ids)[inside]
    return {"input_ids": tokens.view(count, width), "position_ids": positions.view(count, width), "owner": owner.view(count, width)}


def together(owner: Tensor) -> Tensor:
    """bool [windows, 1, width, width]: whether two tokens are of one text. Padding is a text of its own."""
    return owner[:, None, :, None] == owner[:, None, None, :]


def mean_by_owner(hidden: Tensor, owner: Tensor) -> Tensor:
    """hidden [windows, width, d] -> means over the tokens of each text, [texts, d]."""
    inside = owner.flatten() >= 0
    texts = owner.flatten()[inside]
    count = texts.bincount()
    flat = hidden.flatten(0, 1)[inside]
    return flat.new_zeros(len(count), flat.shape[1]).index_add(0, texts, flat) / count[:, None].to(flat.dtype)
