"""Two things that were tried on all-MiniLM-L6-v2 and are not in rbe_torch, because they bring little: what each of them does.

    python benchmarks/quality_tried.py --data DIR [--tune 2] [--only "refitted"]

    calibrated      compress(model, layout, calibration=128 sentences), what both start from
    refitted        the same with a basis fitted under the moments: 64 rows of each layer are encoded, the basis that loses least with these codes
                    is solved for, and so on for 10 rounds; 16 other rows of each layer are encoded in the first basis and in the last
    tuned           calibrated, then distilled for --tune minutes of CPU time (basis, gains, biases, norms)
    codes moved     the same, and every 16 steps codes move too (quality_moves.py)

Scores are those of quality.py. A row that OUT/quality_tried.json has already is kept.
"""

from __future__ import annotations

import copy
import importlib
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import quality_rows
import torch
from quality import Sentences
from quality_methods import CPU, energy, lost_under, ours, phases
from quality_moves import Moving
from quality_rows import Methods, Result
from torch import Tensor

from rbe_torch import calibrate, models, replace, tune, walk
from rbe_torch.codebook import fit_basis
from rbe_torch.layout import Layout
from rbe_torch.moments import Problem, problem_of

SAMPLES = 128
LAYOUTS = ("rbe8x2_g8", "rbe8_g8")
ROUNDS, ROWS, DAMPING, RIDGE, SOLVER_STEPS = 10, 64, 0.1, 1e-3, 20
JUDGES, JUDGE_ROUNDS = 8, 4  # batches that judge moves, two in each of four rounds
LAST_ROUND = 0.85  # of the time: what moves is trained a little after that


# ---- a basis fitted under the moments ------------------------------------------------------------------------------------------------
class Encoded:
    """Some rows of a layer in codes. What they decode to is linear in the basis; all layers count the same, whatever the size of their outputs."""

    def __init__(self, problem: Problem, layout: str, basis: Tensor) -> None:
        self.target, self.hessian = problem.target, problem.hessian
        self.gain, self.codes, _ = calibrate.solve(problem, Layout.parse(layout), basis)
        self.place = {"layout": layout, "in_features": self.target.shape[1]}
        self.share = 1 / energy(self.target, self.hessian)

    def decode(self, basis: Tensor) -> Tensor:
        return torch.ops.rbe.decode(self.codes, basis, self.gain, **self.place)

    def gathered(self, weight: Tensor, basis: Tensor) -> Tensor:
        """The transpose of `decode`, [M, 256, g] of [m, n]."""
        return self.share * torch.ops.rbe.decode_backward(weight.contiguous(), self.codes, basis, self.gain, **self.place)[0]

    def lost(self, basis: Tensor) -> float:
        return lost_under(self.target, self.decode(basis), self.hessian)


def solved(encoded: list[Encoded], basis: Tensor) -> Tensor:
    """The basis that loses least with these codes, drawn a little to the one there is: conjugate gradients on the normal equations."""

    def total(weight_of: Any) -> Tensor:
        return torch.stack([rows.gathered(weight_of(rows), basis) for rows in encoded]).sum(0)

    diagonal = total(lambda rows: rows.gain[:, None] * rows.hessian.diagonal().expand_as(rows.target))
    ridge = RIDGE * diagonal.mean()
    rest = total(lambda rows: (rows.target - rows.decode(basis)) @ rows.hessian)
    change, direction = torch.zeros_like(basis), rest / (diagonal + ridge)
    size = (rest * direction).sum()
    for _ in range(SOLVER_STEPS):
        turned = ridge * direction + total(lambda rows: rows.decode(direction) @ rows.hessian)
        step = size / (direction * turned).sum()
        change += step * direction
        rest = rest - step * turned
        ready = rest / (diagonal + ridge)
        before, size = size, (rest * ready).sum()
        direction = ready + size / before * direction
    return (basis + change).half().float()


def refitted(task: Sentences, layout: str) -> Result:
    model = models.load_dense(task.source)
    parts: tuple[list[Problem], list[Problem]] = ([], [])
    weights = []
    for visit, layer, members in phases(task, model):
        fit, held = calibrate.gather(visit, layer, replace.features(members[0][1])[0], CPU)
        for _, module in members:
            weight = replace.dense_weight(module).float()
            step = -(-len(weight) // ROWS)
            for part, rows in zip(parts, (weight[::step], weight[step // 2 :: 4 * step]), strict=True):
                part.append(problem_of(rows, fit.plus(held), DAMPING, module.bias is not None))
            weights.append(weight)
    basis = first = fit_basis(weights, layout)
    losses = []
    for _ in range(ROUNDS):
        encoded = [Encoded(problem, layout, basis) for problem in parts[0]]
        losses.append(_mean([rows.lost(basis) for rows in encoded]))
        basis = solved(encoded, basis)
    others = [_mean([Encoded(problem, layout, table).lost(table) for problem in parts[1]]) for table in (first, basis)]
    losses.append(_mean([Encoded(problem, layout, basis).lost(basis) for problem in parts[0]]))
    with patch.object(importlib.import_module("rbe_torch.compress"), "fit_basis", lambda *_: basis):
        model, bits, notes = ours(task, layout, calibration=task.calibration)
    return model, bits, {**notes, "fitted": losses, "others": others}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- codes moved in distillation -----------------------------------------------------------------------------------------------------
def distilled(task: Sentences, start: Result, seconds: float, moving: bool) -> Result:
    model, bits, _ = start
    model, teacher, calls = copy.deepcopy(model), models.load_dense(task.source), walk.calls_of(task.more, CPU)
    judging = range(len(calls) // (2 * JUDGES), len(calls), len(calls) // JUDGES)  # sorted by length: some of each
    training = [index for index in range(len(calls)) if index not in judging]

    @cache
    def wanted(index: int) -> Tensor:
        with torch.no_grad():
            return walk.output_tensor(calls[index].run(teacher)).float()

    def loss(index: int) -> Tensor:
        return tune.distance(calls[index].run(model), wanted(index), calls[index].mask)

    def judge(number: int) -> float:
        return _mean([float(loss(index)) for index in judging[number % JUDGE_ROUNDS :: JUDGE_ROUNDS]])

    student = Moving(model, judge, time.process_time() + LAST_ROUND * seconds) if moving else tune._Student(model, basis=True)

    def trained(place: int) -> Tensor:
        if moving and torch.is_grad_enabled():
            student.step()
        return loss(training[place])

    with patch.object(tune, "time", SimpleNamespace(monotonic=time.process_time)):  # other jobs of the machine do not count
        facts = tune._fit(student, trained, len(training), seconds, 0, False, "tune")
    return model, bits, {"tuning": facts, **({"moves": student.log} if moving else {})}


# ---- rows ----------------------------------------------------------------------------------------------------------------------------
def methods(task: Sentences, minutes: float) -> Methods:
    @cache
    def calibrated(layout: str) -> Result:
        return ours(task, layout, calibration=task.calibration)

    made: Methods = {}
    for layout in LAYOUTS:
        made[f"{layout} calibrated"] = lambda layout=layout: calibrated(layout)
        made[f"{layout} refitted"] = lambda layout=layout: refitted(task, layout)
        made[f"{layout} tuned"] = lambda layout=layout: distilled(task, calibrated(layout), 60 * minutes, False)
        made[f"{layout} codes moved"] = lambda layout=layout: distilled(task, calibrated(layout), 60 * minutes, True)
    return made


def said(row: dict[str, Any]) -> str:
    text = ""
    if "fitted" in row:
        text = f"rows fitted to {row['fitted'][0]:.4f} -> {row['fitted'][-1]:.4f}, others {row['others'][0]:.4f} -> {row['others'][1]:.4f}"
    if "tuning" in row:
        text = f"{row['tuning']['steps']} steps, held out {row['tuning']['before']:.4f} -> {row['tuning']['after']:.4f}"
    if "moves" in row:
        fallen, codes, layers = (sum(part[key] for part in row["moves"]) for key in ("fallen", "codes", "layers"))
        text += f"; {len(row['moves'])} rounds moved {codes} codes in {layers} layers, which took {fallen:.4f} off the judges' loss"
    return text


def main() -> int:
    parser = quality_rows.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb/ and sst2/")
    arguments = parser.parse_args()
    rows = quality_rows.start(arguments, "quality_tried")
    task = Sentences(arguments.data, "minilm", SAMPLES, None)
    rows.run(methods(task, arguments.tune), task, arguments.only, arguments.again)
    print(rows.table({"cosine": lambda row: f"{row['cosine']:.4f}", "5 % worst": lambda row: f"{row['cosine_p5']:.4f}", "what it did": said}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
