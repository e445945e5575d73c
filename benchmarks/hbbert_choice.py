"""How the rows of benchmarks/hbbert.py got their lengths and curvatures: validation F1 of a grid, on a seed that no row is reported on.

A cheaper run than that of a row: only the encoder's upper two layers and the head are trained, on outputs of the layers below that are
computed once. Everything else, loss, pairs, steps, rates and rule, is a row's. Flat and curved spaces get the same
head and as many choices. Results are kept in OUT/hbbert_choice.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from typing import Any

import hbbert
import numpy as np
import torch
from harness import cpu_name, table
from hbbert_bench import MANIFOLD, Bench
from hbbert_head import LENGTH, Projected, optimiser_with_head, principal_axes
from torch import Tensor, nn

from rbe_torch.hyperbolic.model import HbBertOutput
from rbe_torch.hyperbolic.training import Names, encode_all, train

UPPER = 2  # layers that are trained
# dimensions (0: all, with a learned scale), factor on the vectors, c, whether it is learned
GRID = (
    *((8, factor, 0.0, False) for factor in (3.0, 2.0, 1.0, 0.5, 0.25, 0.125)),
    *((8, 1.0, c, False) for c in (1 / 384, 0.01, 0.04, 0.1)), (8, 0.5, 0.04, False), (8, 1.0, 0.04, True),
    (0, 1.0, 0.0, False), (0, 1.0, 0.01, False), (0, 1.0, 0.04, False),
)  # fmt: skip


class Upper(nn.Module):
    """The last UPPER layers. entities [B, L]: the number of the entity, repeated; lower: [entities, longest, d], what they read."""

    def __init__(self, bert: nn.Module, lower: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(list(bert.encoder.layer[-UPPER:])))
        self.lower = [lower]  # in a list: no state of the module

    def forward(self, entities: Tensor, mask: Tensor) -> HbBertOutput:
        hidden = self.lower[0][entities[:, 0], : mask.shape[1]]
        unseen = (1.0 - mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        for layer in self.layers:
            hidden = layer(hidden, unseen)
        weights = mask[..., None].float()
        return HbBertOutput(embedding=(hidden.float() * weights).sum(1) / weights.sum(1))


class Entities:
    """Names whose token ids are the numbers of the entities."""

    def __init__(self, names: Names) -> None:
        self.names, self.lengths = names, names.lengths

    def batch(self, entities: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        mask = self.names.batch(entities, device)[1]
        return entities.to(device)[:, None].expand(-1, mask.shape[1]), mask


@torch.no_grad()
def lower_outputs(bench: Bench) -> Tensor:
    names, bert = bench.names, bench.dense.eval()
    outputs = torch.zeros(*names.ids.shape, bert.config.hidden_size)
    for chunk in names.lengths.argsort(stable=True).split(256):
        states = bert(*names.batch(chunk, torch.device("cpu")), output_hidden_states=True).hidden_states[-UPPER - 1]
        outputs[chunk, : states.shape[1]] = states
    return outputs


def validate(bench: Bench, lower: Tensor, dims: int, factor: float, c: float, learnable: bool) -> dict[str, Any]:
    torch.manual_seed(bench.options.seed)
    start = principal_axes(bench.means, dims, LENGTH * factor) if dims else None
    model, names = Projected(Upper(bench.dense, lower), MANIFOLD, c, learnable, start, LENGTH * factor), Entities(bench.names)
    settings = replace(bench.settings, hard=0.5)
    cpu = time.process_time()
    losses = train(model, names, bench.hierarchy, bench.splits["mixed"].train, settings, optimiser_for=optimiser_with_head)
    points = encode_all(model, names)
    found = [entry["validation"] for entry in bench.f1_of_both_tasks(model, points).values()]
    at_end = float(torch.as_tensor(model.manifold.c).detach())
    depth = float((at_end**0.5 * points.norm(dim=1)).mean())
    ends = [float(np.mean(part)) for part in (losses[:10], losses[-10:])]
    facts = {"validation_f1": float(np.mean(found)), "c_at_end": at_end, "depth_in_ball": depth, "loss": ends}
    return {**facts, "cpu_seconds": time.process_time() - cpu}


def main() -> int:
    parser = hbbert.parser(__doc__)
    parser.set_defaults(seed=10, bfloat16=True, device="cpu")
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "hbbert_choice.json"
    kept = json.loads(path.read_text()) if path.is_file() else {"cpu": cpu_name(), "seed": options.seed, "rows": []}
    bench, lower = None, None
    for dims, factor, c, learnable in GRID:
        choice = {"dims": dims, "factor": factor, "c": c, "learned": learnable}
        if any(row["choice"] == choice for row in kept["rows"]):
            continue
        if bench is None:
            bench = Bench(options)
            lower = lower_outputs(bench)
        kept["rows"].append({"choice": choice, **validate(bench, lower, dims, factor, c, learnable)})
        path.write_text(json.dumps(kept, indent=1) + "\n")
    rows = [
        {**row["choice"], "validation F1": f"{row['validation_f1']:.3f}", "depth": f"{row['depth_in_ball']:.2f}"} for row in kept["rows"]
    ]
    print(table(rows, ("dims", "factor", "c", "learned", "validation F1", "depth")) + f"\n\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
