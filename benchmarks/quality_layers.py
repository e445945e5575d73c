"""Two bits a weight, layer by layer: AQLM's own quantiser, GPTQ int2 and rbe8x2_g8 under the very same X^T X.

    PYTHONPATH=AQLM python benchmarks/quality_layers.py --data DIR                 all 37 layers of all-MiniLM-L6-v2 (AQLM: minutes each)
    PYTHONPATH=AQLM python benchmarks/quality_layers.py --data DIR --layers 12     the first twelve

X^T X is that of what reaches a layer behind those before it in AQLM's codes, from quality.py's 1,024 sentences, tokens unweighted; the
target is the dense weight. So none has what this library does besides (moments, targets, bias correction): it is encoder against encoder.
rbe8x2_g8 has one basis for the model, fitted to its weights; AQLM has code-books for each layer. A layer that OUT/quality_layers.json has
already is made by AQLM again, for the prefix, but not measured again.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import harness
import quality_rows
import rivals
import torch
from quality import AQLM_EPOCHS, SAMPLES, Sentences
from quality_methods import Quantised, behind_the_prefix, lost_under, set_weight
from torch import Tensor

from rbe_torch import calibrate, models, replace
from rbe_torch.codebook import fit_basis
from rbe_torch.layout import Layout
from rbe_torch.moments import Problem

LAYOUT = Layout.parse("rbe8x2_g8")
DAMPING = 0.01  # of the mean diagonal, as published for GPTQ


def ours(weight: Tensor, hessian: Tensor, basis: Tensor, weights: int) -> Quantised:
    """Codes and gain under the damped X^T X; the basis is counted as a share of the model's, by weights."""
    hessian = hessian / hessian.diagonal().mean() + DAMPING * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(hessian.double().flip(0, 1)).flip(0, 1).float().contiguous()
    nothing = torch.zeros(len(hessian), dtype=torch.float64)
    gain, codes, _ = calibrate.solve(Problem(weight, hessian, factor, weight, nothing, nothing, DAMPING), LAYOUT, basis)
    m, n = weight.shape
    decoded = torch.ops.rbe.decode(codes, basis, gain, layout=str(LAYOUT), in_features=n)
    return decoded, 8 * (LAYOUT.bytes(m, n, basis=False) / (m * n) + LAYOUT.basis_bytes / weights)


def main() -> int:
    parser = quality_rows.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb/ and sst2/")
    parser.add_argument("--layers", type=int, help="how many, in order of execution; default all")
    arguments = parser.parse_args()
    rows = quality_rows.start(arguments, "quality_layers")
    task = Sentences(arguments.data, "minilm", SAMPLES, None)
    model = models.load_dense(task.source)
    dense = [replace.dense_weight(entry.module).clone() for entry in replace.find_linears(model) if entry.convertible]
    basis, weights = fit_basis(dense, LAYOUT), sum(weight.numel() for weight in dense)
    with torch.no_grad():
        for name, module, hessian in islice(behind_the_prefix(task, model), arguments.layers):
            weight = replace.dense_weight(module).float().contiguous()
            made = {"AQLM": rivals.aqlm(weight, hessian, 2, AQLM_EPOCHS)}
            if name not in rows.facts["rows"]:
                made["GPTQ"] = (rivals.gptq_published(weight, hessian, 2), rivals.integer_bits(2))
                made["rbe"] = ours(weight, hessian, basis, weights)
                row = {method: {"lost": lost_under(weight, decoded, hessian), "bits": bits} for method, (decoded, bits) in made.items()}
                rows.keep(name, {"shape": list(weight.shape), **row})
            set_weight(module, made["AQLM"][0])
    titles = {"AQLM": "AQLM 2x8 g8", "GPTQ": "GPTQ int2 g64", "rbe": str(LAYOUT)}
    table = [
        {"layer": name, **{title: f"{row[key]['lost']:.4f} ({row[key]['bits']:.2f})" for key, title in titles.items()}}
        for name, row in rows.facts["rows"].items()
    ]
    print(harness.table(table, ["layer", *titles.values()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
