"""Single weights of many times the size of their row: they are met, and the other weights do not pay for it."""

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch.codebook import fit_basis
from rbe_torch.encode import encode_layer
from rbe_torch.layout import Layout
from rbe_torch.outliers import ROOM, centres_of, row_size

SIZE = 300.0  # times a row's root mean square: MiniLM has one such weight
NEAR = 0.02  # of an outlier, at four stages
LITTLE = 1.15  # what outliers may cost the other weights of the matrix, squared error
OUTPUT = 0.01  # relative squared error of a calibrated layer's output at four bits


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(m=384, n=384):
    weight = gaussian(m, n)
    weight[99, 85], weight[7, 300], weight[200, 0] = SIZE, -0.4 * SIZE, 0.1 * SIZE
    return weight


def decoded(weight, layout, basis=None):
    made = encode_layer(weight, Layout.parse(layout), basis)
    return torch.ops.rbe.decode(made.codes, made.basis, made.gain, layout=layout, in_features=weight.shape[1])


def test_outliers_are_met_and_the_rest_pays_little():
    plain, weight = gaussian(384, 384), with_outliers()
    got, met = decoded(weight, "rbe8x4_g8"), decoded(plain, "rbe8x4_g8")
    for at in ((99, 85), (7, 300), (200, 0)):
        assert abs(float(got[at] / weight[at]) - 1) < NEAR
    ordinary = weight == plain
    assert float((got - weight)[ordinary].square().sum()) < LITTLE * float((met - plain)[ordinary].square().sum())


@pytest.mark.parametrize("layout", ["rbe8_g8", "rbe8x2_g8", "rbe16s_g8", "rbe16sx2_g8"])
def test_every_table_without_scales_holds_the_largest_weight(layout):
    weight = with_outliers()
    assert abs(float(decoded(weight, layout)[99, 85]) / SIZE - 1) < 0.1


def test_a_table_of_ordinary_weights_leaves_no_room():
    assert float(fit_basis([gaussian(384, 384)], "rbe8x2_g8").abs().max()) < 6


def test_calibration_brings_a_row_into_the_reach_of_a_table_that_was_fitted_without_it():
    """The outlier meets the largest input: its row must take a larger gain, or the layer is lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[5, 9] = 40 * float(model[1].weight.square().mean().sqrt())
    table = fit_basis([gaussian(256, 64)], "rbe8x4_g8")
    from rbe_torch.calibrate import calibrate_layer
    from rbe_torch.moments import Moments

    fit, held = Moments.empty(64, torch.device("cpu"), False), Moments.empty(64, torch.device("cpu"), True)
    for part, seed in ((fit, 1), (held, 2)):
        x = gaussian(2000, 64, seed=seed)
        x[:, 9] *= 10
        part.add(x, x)
    made = calibrate_layer(model[1], Layout.parse("rbe8x4_g8"), nn.Parameter(table), fit, held)
    assert made.loss < OUTPUT


@pytest.mark.parametrize("layout", ["rbe8_g8", "rbe8x2_g8", "rbe16s_g8"])
def test_matrices_of_few_weights_and_of_zeros(layout):
    for weight in (torch.zeros(3, 5), torch.full((1, 1), 7.0), torch.eye(9), torch.zeros(4, 16).index_fill(1, torch.tensor([3]), 1e4)):
        model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
        model[0].weight.data = weight.clone()
        rbe_torch.compress(model, layout, progress=False, include=".*")
        assert bool(torch.isfinite(model[0].weight).all())


def test_row_size():
    loud = gaussian(4096, seed=1).index_fill(0, torch.tensor([3]), 1e4)
    rows = torch.stack([gaussian(4096), torch.zeros(4096), loud, torch.eye(4096)[0]])
    size = row_size(rows)
    assert float(size[0]) == pytest.approx(float(rows[0].square().mean().sqrt()), rel=0.01)
    assert float(size[1]) == 0
    assert float(size[2]) == pytest.approx(1e4 / 64 / 8, rel=0.01)  # at least an eighth of the root mean square
    assert float(size[3]) == pytest.approx(1 / 64 / 8, rel=0.01)


def test_centres():
    assert len(centres_of(torch.empty(0, 8), ROOM)) == 0
    three = torch.eye(8)[:3].repeat(5, 1)
    assert sorted(centres_of(three, ROOM).argmax(1).tolist()) == [0, 1, 2]
    assert len(centres_of(gaussian(500, 8), ROOM)) == ROOM
