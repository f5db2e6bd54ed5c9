"""Pictures of the documentation, drawn as SVG from measured numbers without a plotting library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars of one experiment: top-1 in per cent by name."""

    title: str
    source: str
    bars: tuple[tuple[str, float], ...]
    reference: tuple[str, float] | None = None


# Sources: `make demo` as printed in docs/tutorials/digits.md, and the tables of docs/explanation/science.md.
PANELS = (
    Panel(
        "Digits, 150 labels",
        "stillroom demo",
        (("labels", 61.0), ("KD", 90.7), ("DIST++", 96.0)),
        ("teacher", 99.0),
    ),
    Panel(
        "CIFAR-10, views, 60 epochs",
        "recipe cifar10-views",
        (("labels", 61.0), ("fixed", 58.0), ("consistent", 63.7), ("FunMatch", 63.0)),
        ("teacher", 71.9),
    ),
    Panel(
        "CIFAR-10, long tail",
        "recipe cifar10-losses",
        (("CE", 43.6), ("KD", 55.6), ("DKD", 59.7), ("DIST", 64.3)),
        ("teacher", 71.9),
    ),
)
_WIDTH, _HEIGHT = 960, 330
_PANEL_WIDTH, _TOP, _BOTTOM = 320, 64, 262
_TEXT, _MUTED, _BAR, _BASELINE = "#1f2937", "#6b7280", "#3f51b5", "#9ca3af"


def results() -> str:
    """Top-1 of students by their losses and views, one panel per experiment."""
    body = "\n".join(_panel(panel, index * _PANEL_WIDTH) for index, panel in enumerate(PANELS))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif">\n'
        "<title>Top-1 accuracy of students on three data sets, by losses and views</title>\n"
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _panel(panel: Panel, left: int) -> str:
    step = (_PANEL_WIDTH - 40) / len(panel.bars)
    width = min(52.0, step - 14)
    lines = [
        _text(left + 24, 28, panel.title, size=15, weight="bold"),
        _text(left + 24, 48, f"top-1, %  ·  {panel.source}", size=11, colour=_MUTED),
        f'<line x1="{left + 20}" x2="{left + _PANEL_WIDTH - 16}" y1="{_BOTTOM}" y2="{_BOTTOM}" stroke="#d1d5db"/>',
    ]
    if panel.reference is not None:
        name, value = panel.reference
        y = _y(value)
        lines.append(
            f'<line x1="{left + 20}" x2="{left + _PANEL_WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{_MUTED}" stroke-dasharray="4 4"/>'
        )
        lines.append(
            _text(left + _PANEL_WIDTH - 16, y - 5, f"{name} {value:.1f}", size=11, colour=_MUTED, anchor="end")
        )
    for index, (name, value) in enumerate(panel.bars):
        centre, y = left + 20 + step * (index + 0.5), _y(value)
        colour = _BASELINE if index == 0 else _BAR
        lines.append(
            f'<rect x="{centre - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BOTTOM - y:.1f}" rx="3" '
            f'fill="{colour}"/>'
        )
        lines.append(_text(centre, y + 18, f"{value:.1f}", size=12, colour="#ffffff", weight="bold", anchor="middle"))
        lines.append(_text(centre, _BOTTOM + 18, name, size=12, anchor="middle"))
    return "\n".join(lines)


def _y(value: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP - 16) * value / 100


def _text(
    x: float, y: float, text: str, *, size: int, colour: str = _TEXT, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{text}</text>'
    )
