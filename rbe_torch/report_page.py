"""A report as one HTML page: no scripts, no other files."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from .report import frontier_lines

if TYPE_CHECKING:
    from .report import LayerRow, Report

_STYLE = """body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
table { border-collapse: collapse } td, th { padding: 1px 10px 1px 0; text-align: right; white-space: nowrap } td:first-child,
th:first-child { text-align: left } .bar { background: #3b6ea5; height: 10px; display: inline-block; vertical-align: middle } .worst {
background: #c0392b } .cell { text-align: left; width: 24em } pre { background: #f5f5f5; padding: 8px; overflow-x: auto }"""


def page(report: Report) -> str:
    """The page as a string."""
    calibrated = any(row.output_error is not None for row in report.converted)
    values = [_lost(row, calibrated) for row in report.converted]
    largest = max((value for value in values if value is not None), default=1.0) or 1.0
    worst = {row.name for row in report.worst()}
    name = "output error" if calibrated else "relative error"
    rows = []
    for row, value in zip(report.converted, values, strict=True):
        width = 0.0 if value is None else 24 * value / largest
        rows.append(
            f"<tr><td>{escape(row.name)}</td><td>{row.out_features}x{row.in_features}</td><td>{escape(row.layout or '')}</td>"
            f"<td>{report.layer_bits(row):.3f}</td><td>{'-' if value is None else format(value, '.4f')}</td>"
            f"<td class=cell><span class='bar{' worst' if row.name in worst else ''}' style='width:{width:.2f}em'></span></td></tr>"
        )
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>rbe compression report</title>",
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Compression report</h1>",
        f"<p>{escape(report.summary(timed=False))}</p>",
    ]
    if report.tuning is not None:
        tuning = report.tuning
        parts.append(
            f"<p>Fine-tuning: {tuning['steps']} steps, loss on batches not trained on {tuning['before']:.5f} to "
            f"{tuning['after']:.5f}{'' if tuning['kept'] else ', put back'}.</p>"
        )
    parts.append(
        f"<p>The {len(worst)} layers that lose most are red. {'Output error: what the outputs lose on sequences not fitted.' if calibrated else 'Relative error: what the weights lose.'}</p>"
    )
    parts.append(
        f"<table><tr><th>layer</th><th>shape</th><th>layout</th><th>bits/weight</th><th>{name}</th><th class=cell></th></tr>{''.join(rows)}</table>"
    )
    if report.frontier:
        lines = "\n".join(frontier_lines(report.frontier, most=40))
        parts.append(f"<h2>Mixes considered</h2><pre>{escape(lines)}</pre>")
    if report.skipped:
        skipped = "".join(
            f"<tr><td>{escape(row.name)}</td><td>{escape(row.kind)}</td><td style='text-align:left'>{escape(row.reason)}</td></tr>"
            for row in report.skipped
        )
        parts.append(f"<h2>Left alone</h2><table>{skipped}</table>")
    notes = [f"{row.name}: {row.note}" for row in report.converted if row.note] + report.notes
    if notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return "\n".join([*parts, "</body></html>", ""])


def _lost(row: LayerRow, calibrated: bool) -> float | None:
    return row.output_error if calibrated else row.relative_error
