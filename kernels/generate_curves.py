"""Generates kernels/curve_table.c: the 16 curves of the RBE format and their derivatives, correctly rounded to float32.

    T[(cat*4 + sub)*2 + deriv][a] = float32(F(2 a / 256)) or float32(F'(2 a / 256)),  a = 0..256

Values are computed with 200 bits (mpmath) and rounded once, to nearest even: a float64 libm may flip the last bit of a float32.
Run without arguments to rewrite the file, with --check to verify that the file is what this script gives.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mpmath import atan, besselj, cos, cosh, exp, expm1, log1p, mp, mpf, pi, sech, sin, sinh, sqrt, tanh, workprec

POINTS = 257
TARGET = Path(__file__).with_name("curve_table.c")
Curve = Callable[[mpf], mpf]

# (name, F, F'), in the order cat*4 + sub
CURVES: list[tuple[str, Curve, Curve]] = [
    ("tanh(r/2)", lambda r: tanh(r / 2), lambda r: sech(r / 2) ** 2 / 2),
    ("tanh(r)", tanh, lambda r: sech(r) ** 2),
    ("sin(r/2)", lambda r: sin(r / 2), lambda r: cos(r / 2) / 2),
    ("1 - exp(-r)", lambda r: -expm1(-r), lambda r: exp(-r)),
    ("sinh(r)", sinh, cosh),
    ("2 sinh(r/2)", lambda r: 2 * sinh(r / 2), lambda r: cosh(r / 2)),
    ("cosh(r) - 1", lambda r: 2 * sinh(r / 2) ** 2, sinh),
    ("exp(r) - 1", expm1, exp),
    ("r / sqrt(1 + r^2)", lambda r: r / sqrt(1 + r * r), lambda r: 1 / sqrt(1 + r * r) ** 3),
    ("r / (1 + r)", lambda r: r / (1 + r), lambda r: 1 / (1 + r) ** 2),
    ("(2/pi) atan(r)", lambda r: 2 / pi * atan(r), lambda r: 2 / pi / (1 + r * r)),
    ("log(1 + r)", log1p, lambda r: 1 / (1 + r)),
    ("r exp(-r^2/2)", lambda r: r * exp(-r * r / 2), lambda r: (1 - r * r) * exp(-r * r / 2)),
    ("J1(r)", lambda r: besselj(1, r), lambda r: (besselj(0, r) - besselj(2, r)) / 2),
    ("sin(r) exp(-r^2/4)", lambda r: sin(r) * exp(-r * r / 4), lambda r: (cos(r) - r / 2 * sin(r)) * exp(-r * r / 4)),
    ("r^2 / (1 + r^2)", lambda r: r * r / (1 + r * r), lambda r: 2 * r / (1 + r * r) ** 2),
]


def table() -> list[tuple[str, list[float]]]:
    """The 32 curves as (name, 257 floats that are exact float32 values), in the order of the data."""
    rows = []
    with workprec(200):
        for name, value, slope in CURVES:
            for title, function in ((name, value), (f"d/dr {name}", slope)):
                exact = [function(mpf(a) / 128) for a in range(POINTS)]
                with workprec(24):  # no value is subnormal, so 24 bits are a float32; float() turns it into a double without rounding
                    rows.append((title, [float(+x) for x in exact]))
    assert all(x == 0.0 or abs(x) >= 2.0**-126 for _, values in rows for x in values)
    return rows


def _literal(x: float) -> str:
    mantissa, exponent = x.hex().split("p")  # six hexadecimal digits hold a float32
    head, _, digits = mantissa.partition(".")
    return f"{head}.{digits[:6]}p{exponent}f" if x else "0.0f"


def source() -> str:
    """The text of kernels/curve_table.c."""
    lines = [
        "// The 16 curves of the RBE format and their derivatives as float32, T[(cat*4 + sub)*2 + deriv][a] at r = 2 a / 256, a = 0..256.",
        "// Data: written by kernels/generate_curves.py, which also checks it (--check). Do not edit.",
        '#include "format.h"',
        "",
        "// clang-format off",
        "const float rbe_curve_table[RBE_CURVES][RBE_CURVE_POINTS] = {",
    ]
    for curve, (title, values) in enumerate(table()):
        lines.append(f"    {{  // {curve}: {title}")
        for start in range(0, POINTS, 7):
            lines.append("        " + " ".join(f"{_literal(x)}," for x in values[start : start + 7]))
        lines.append("    },")
    return "\n".join([*lines, "};", ""])


def main() -> int:
    """Writes or checks the file; exit status 1 if --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in file instead of writing it")
    arguments = parser.parse_args()
    assert mp.prec == 53 and len(CURVES) * 2 == 32
    if not arguments.check:
        TARGET.write_text(source(), encoding="utf-8")
        return 0
    if TARGET.read_text(encoding="utf-8") != source():
        print(f"{TARGET.name} is not what {Path(__file__).name} gives: run it without --check and look at the difference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
