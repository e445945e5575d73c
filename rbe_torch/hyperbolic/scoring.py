"""HiT's loss and score of (child, parent) pairs of points x, with d the distance and |x| = d(0, x) (arXiv 2401.11374, section 3):

clustering    max(0, d(child, parent) - d(child, wrong) + alpha)
centripetal   max(0, |parent| - |child| + beta)
score         -(d(child, parent) + lambda (|parent| - |child|)); a pair is accepted above a threshold
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layers import Space

ALPHA, BETA = 5.0, 0.1  # HiT's margins
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # lambdas tried on the validation pairs


def hierarchy_loss(manifold: Space, child: Tensor, parent: Tensor, wrong: Tensor, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """Mean clustering plus mean centripetal loss. child, parent: points [B, d]; wrong: points [B, N, d]."""
    near = manifold.dist(child, parent)
    far = manifold.dist(child[:, None], wrong)
    clustering = (near[:, None] - far + alpha).relu().mean()
    centripetal = (manifold.dist0(parent) - manifold.dist0(child) + beta).relu().mean()
    return clustering + centripetal


@dataclass(frozen=True)
class Rule:
    """When a pair is accepted: score > threshold."""

    weight: float  # lambda
    threshold: float


def score(distance: np.ndarray, difference: np.ndarray, weight: float) -> np.ndarray:
    """distance = d(child, parent), difference = |parent| - |child|."""
    return -(distance + weight * difference)


@torch.no_grad()
def features(manifold: Space, points: Tensor, pairs: list[tuple[int, int]], wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels bool, distance, difference), each [len(pairs) * (1 + N)], of the positives and then of their negatives. points [entities,
    d]."""
    child = torch.tensor([pair[0] for pair in pairs], device=points.device)
    parent = torch.tensor([pair[1] for pair in pairs], device=points.device)
    other = torch.as_tensor(wrong, device=points.device)
    children = torch.cat([child, child[:, None].expand_as(other).flatten()])
    parents = torch.cat([parent, other.flatten()])
    norms = manifold.dist0(points)
    distance = torch.cat([manifold.dist(points[a], points[b]) for a, b in zip(children.split(65536), parents.split(65536), strict=True)])
    labels = np.arange(len(children)) < len(pairs)
    return labels, distance.double().cpu().numpy(), (norms[parents] - norms[children]).double().cpu().numpy()


def f1(labels: np.ndarray, accepted: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN); 0 where nothing is right."""
    right = int((labels & accepted).sum())
    return 2 * right / max(1, int(labels.sum()) + int(accepted.sum()))


def best_rule(labels: np.ndarray, distance: np.ndarray, difference: np.ndarray) -> tuple[Rule, float]:
    """The lambda of WEIGHTS and the threshold of highest F1 on these pairs, and that F1."""
    best, found = Rule(0.0, 0.0), -1.0
    for weight in WEIGHTS:
        scores = score(distance, difference, weight)
        order = np.argsort(-scores, kind="stable")
        values, right = scores[order], np.cumsum(labels[order])
        every = 2 * right / (labels.sum() + np.arange(1, len(values) + 1))
        last = np.append(values[1:] < values[:-1], True)  # a threshold cannot part equal scores
        every = np.where(last, every, -1.0)
        at = int(np.argmax(every))
        if every[at] > found:
            below = values[at + 1] if at + 1 < len(values) else values[at] - 1.0
            best, found = Rule(weight, float((values[at] + below) / 2)), float(every[at])
    return best, found


def f1_by(rule: Rule, labels: np.ndarray, distance: np.ndarray, difference: np.ndarray) -> float:
    return f1(labels, score(distance, difference, rule.weight) > rule.threshold)
