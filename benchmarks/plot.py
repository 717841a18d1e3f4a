"""Draw the figures as one image. Needs matplotlib: ``pip install 'rtservice[benchmarks]'``."""

from pathlib import Path

from benchmarks.measure import Figures, Result
from benchmarks.report import machine, over_rounds

OURS, PEERS = "#c2410c", "#94a3b8"
COLUMNS = 3


def draw(results: list[Result], path: Path) -> None:
    """Draw server CPU (and idle memory) for each case, with the range over the rounds, into a PNG file."""
    # Optional, also for the type checker: the ignores apply only if matplotlib is missing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    inches = (3.6 * columns, 0.7 + 2.5 * rows)
    figure = Figure(figsize=inches, dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, result in zip(panels, results, strict=False):
        measured = [(row, spread) for row in result.rows if (spread := over_rounds(row, _cost))]
        measured.reverse()  # barh() draws upwards
        medians = [spread.median for _, spread in measured]
        errors = [[s.median - s.low for _, s in measured], [s.high - s.median for _, s in measured]]
        colours = [OURS if "rtservice" in row.server.title else PEERS for row, _ in measured]
        titles = [row.server.title for row, _ in measured]
        whiskers = {"lw": 1, "alpha": 0.5}
        bars = panel.barh(titles, medians, xerr=errors, color=colours, height=0.72, error_kw=whiskers)
        panel.bar_label(bars, [f" {median:.3g}" for median in medians], fontsize=8, padding=2)
        unit = result.case.cost.removeprefix("CPU ")
        noun = {"msg": "message", "conn": "connection"}.get(result.case.unit, result.case.unit)
        panel.set_title(result.case.title, fontsize=9, loc="left")
        panel.set_xlabel(f"{unit} per {noun}", fontsize=8)
        panel.margins(x=0.18)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(figure.axes)[len(results) :]:
        panel.set_visible(False)
    figure.suptitle("Server CPU per echo or delivery (idle: resident memory); lower is better", fontsize=11)
    figure.supxlabel(machine(), fontsize=7, color="#64748b")
    figure.savefig(path, format="png")


def _cost(figures: Figures) -> float:
    return figures.cost
