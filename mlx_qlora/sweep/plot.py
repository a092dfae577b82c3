"""The validation loss over the learning rate, as a small SVG."""

import html
import math
from collections.abc import Callable, Mapping

from mlx_qlora.sweep.compare import standard_error
from mlx_qlora.sweep.grid import Point
from mlx_qlora.sweep.trial import Measured

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 64, 40, 16, 200  # pixels
COLOURS = ("#0a66c2", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c")


def plot(measured: Mapping[tuple[Point, int], Measured]) -> str:
    """One line for each rank, batch and number of steps; bars are one standard error each way.

    Args:
        measured: (point, rung) -> what was found; failed trials have no place in it.
    """
    series: dict[tuple[int, int, int, int], list[tuple[float, float, float]]] = {}
    for (point, _), found in measured.items():
        if not found.failed:
            name = (found.step, point.r, point.batch_size, point.seed)
            at = point.learning_rate, found.validation_loss, standard_error(found.losses)
            series.setdefault(name, []).append(at)
    points = [point for line in series.values() for point in line]
    xs = [math.log10(rate) for rate, _, _ in points]
    lows, highs = [y - e for _, y, e in points], [y + e for _, y, e in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(lows), max(highs)
    x0, x1 = (x0, x1) if x1 > x0 else (x0 - 0.5, x1 + 0.5)
    y1 = y1 if y1 > y0 else y0 + 1

    def place(rate: float, loss: float) -> tuple[float, float]:
        across = (math.log10(rate) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - (loss - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)

    drawn = []
    for loss in (y0, (y0 + y1) / 2, y1):
        y = place(10**x0, loss)[1]
        drawn.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d0d0d5"/>')
        drawn.append(f'<text x="4" y="{y + 4:.1f}">{loss:.4g}</text>')
    for rate in sorted({rate for rate, _, _ in points}):
        x = place(rate, y0)[0]
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{rate:g}</text>')
    drawn.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">learning rate; nats per token</text>')
    for i, (name, line) in enumerate(sorted(series.items())):
        drawn += _line(sorted(line), place, COLOURS[i % len(COLOURS)])
        steps, rank, batch, seed = name
        label = html.escape(f"step {steps}, rank {rank}, batch {batch}, seed {seed}")
        colour, x, y = COLOURS[i % len(COLOURS)], WIDTH - RIGHT + 12, TOP + 16 * i
        drawn.append(f'<text x="{x}" y="{y}" fill="{colour}">{label}</text>')
    height = max(HEIGHT, TOP + 16 * len(series))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" '
        f'fill="#fff"/><title>validation loss over learning rate</title>{"".join(drawn)}</svg>\n'
    )


def _line(
    line: list[tuple[float, float, float]],
    place: Callable[[float, float], tuple[float, float]],
    colour: str,
) -> list[str]:
    path = " ".join("{:.1f},{:.1f}".format(*place(rate, loss)) for rate, loss, _ in line)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for rate, loss, error in line:
        x, y = place(rate, loss)
        bottom, top = place(rate, loss - error)[1], place(rate, loss + error)[1]
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        drawn.append(f'<path d="M{x:.1f} {bottom:.1f}V{top:.1f}" stroke="{colour}"/>')
    return drawn
