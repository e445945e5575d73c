"""Two pictures of a trained Hb-BERT: a part of WordNet's tree in the Poincare disk, and distance from the origin against depth.

Reads the points that benchmarks/hbbert.py left in OUT for the dense rows of --seed (the spaces that have one). They lie in 8 or 384
dimensions. For the disk each gets a point of two, with the distances to the others and to the origin that the model has, as nearly as
Riemannian Adam finds them (hyperbolic multidimensional scaling; the title says how nearly). Edges are geodesics. The second picture shows
the points themselves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import geoopt
import hbbert
import hbbert_bench
import numpy as np
import torch
from torch import Tensor

from rbe_torch.evaluate import spearman
from rbe_torch.hyperbolic import Lorentz, PoincareBall
from rbe_torch.hyperbolic.layers import MANIFOLDS

FARTHEST = 5.0  # distance from the centre of the disk that the farthest point is drawn at
STEPS = 1500


def to_disk(points: Tensor, manifold: Lorentz | PoincareBall) -> tuple[Tensor, float]:
    """Points float64 [N, 2] of the unit disk, and the relative root mean square error of their distances."""
    count = len(points)
    distance = manifold.pairwise_sqdist(points, points).clamp(min=0).sqrt().double()
    norm = manifold.dist0(points).double()
    scale = FARTHEST / float(norm.max())
    distance, norm = distance * scale, norm * scale
    disk = PoincareBall(1.0)
    flat = manifold.logmap0(points).double()
    directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:2]
    start = torch.nn.functional.normalize((flat - flat.mean(0)) @ directions.T, dim=1) * norm[:, None] / 2
    x = geoopt.ManifoldParameter(disk.expmap0(start), manifold=disk)
    optimiser = geoopt.optim.RiemannianAdam([x], lr=0.05)
    upper = torch.triu_indices(count, count, 1)
    wanted = distance[upper[0], upper[1]]
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 - step / STEPS)
        optimiser.zero_grad()
        error = disk.dist(x[upper[0]], x[upper[1]]) - wanted
        (error.square().mean() + (disk.dist0(x) - norm).square().mean()).backward()
        optimiser.step()
    error = (disk.dist(x[upper[0]], x[upper[1]]) - wanted).detach()
    return x.detach(), float(error.square().mean().sqrt() / wanted.square().mean().sqrt())


def draw_disk(bench: hbbert_bench.Bench, points: Tensor, manifold: Lorentz | PoincareBall, word: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole, root = bench.hierarchy, hbbert_bench.find(bench.hierarchy, word)
    kept = [i for i in range(len(whole.names)) if i == root or root in whole.ancestors[i]]
    tree = whole.below(root)
    flat, error = to_disk(points[kept], manifold)
    disk, depths = PoincareBall(1.0), np.array(tree.depths)
    figure, axes = pyplot.subplots(figsize=(10, 10), layout="constrained")
    axes.add_patch(pyplot.Circle((0, 0), 1, fill=False, color="0.6"))
    steps = torch.linspace(0, 1, 24, dtype=torch.float64)[:, None]
    for child, parent in tree.edges:
        start, end = flat[child], flat[parent]
        arc = disk.expmap(start.expand(24, 2), steps * disk.logmap(start, end)).numpy()
        axes.plot(arc[:, 0], arc[:, 1], color="0.75", linewidth=0.6, zorder=1)
    dots = axes.scatter(flat[:, 0], flat[:, 1], c=depths, cmap="viridis", s=14, zorder=2)
    for i in np.argsort(depths, kind="stable")[:24]:
        axes.annotate(tree.names[i], flat[i].tolist(), fontsize=8, zorder=3, xytext=(3, 3), textcoords="offset points")
    figure.colorbar(dots, ax=axes, label=f"edges below '{word}'", shrink=0.6)
    axes.set_title(f"'{word}' and {len(kept) - 1} nouns below it; the drawing's distances err by {100 * error:.0f} % (RMS)")
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_norms(bench: hbbert_bench.Bench, panels: dict[str, tuple[Tensor, Lorentz | PoincareBall]], path: Path) -> dict[str, float]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    depths = np.array(bench.hierarchy.depths)
    levels = [level for level in range(depths.max() + 1) if (depths == level).any()]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), layout="constrained", squeeze=False)
    correlations = {}
    for axis, (name, (points, manifold)) in zip(axes[0], panels.items(), strict=True):
        norms = manifold.dist0(points).numpy()
        correlations[name] = spearman(norms, depths)
        axis.boxplot([norms[depths == level] for level in levels], positions=levels, showfliers=False)
        axis.set_title(f"{name}: Spearman {correlations[name]:.2f}")
        axis.set_xlabel(f"depth below '{bench.options.below}'")
        axis.set_ylabel("distance from the origin")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return correlations


def main() -> int:
    parser = hbbert.parser(__doc__)
    parser.add_argument("--tree", default="carnivore", help="the noun whose descendants the disk shows; default carnivore")
    parser.add_argument("--space", choices=tuple(hbbert_bench.SPACES), default="ours 8", help="of the disk; default ours 8")
    options = parser.parse_args()
    bench = hbbert_bench.Bench(options)
    panels = {}
    for space in hbbert_bench.SPACES:
        file, row = (path(options, space, "dense", options.seed) for path in (hbbert.points_of, hbbert.file_of))
        if not file.is_file() or not row.is_file():
            continue
        points = torch.load(file, weights_only=True)
        if len(points) != len(bench.hierarchy.names):
            raise SystemExit(f"{file} holds {len(points)} points, the nouns below {options.below!r} are {len(bench.hierarchy.names)}")
        panels[space] = (points, MANIFOLDS[hbbert_bench.MANIFOLD](json.loads(row.read_text())["row"]["curvature"]))
    if options.space not in panels:
        missing = f"has no dense row of {options.space} and seed {options.seed}"
        raise SystemExit(f"--out: {options.out} {missing}; run benchmarks/hbbert.py --out {options.out} first")
    draw_disk(bench, *panels[options.space], options.tree, options.out / "hbbert_disk.png")
    print("Spearman of norm and depth:", draw_norms(bench, panels, options.out / "hbbert_norms.png"))
    print(f"written: {options.out / 'hbbert_disk.png'}, {options.out / 'hbbert_norms.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
