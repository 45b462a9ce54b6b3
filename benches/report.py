"""The results of tokens_per_second.py as tables and as a chart."""

from collections.abc import Iterable, Mapping
from html import escape

Figures = Mapping[str, Mapping[str, float]]
"""From the name of an engine to its medians by name ("prefill 512", "decode 0", "load", ...)."""


def speeds(figures: Iterable[str]) -> list[str]:
    """The names of speeds among the names of figures."""
    return [name for name in figures if name.startswith(("prefill", "decode"))]


def tables(engines: Figures, ours: list[str], reads: Mapping[int, int]) -> str:
    """Markdown: each engine's figures, then ours compared with others. `reads`: bytes read per token, by context."""
    bandwidth = engines[ours[0]]["bandwidth"]
    shown = speeds(engines[ours[0]])
    columns = [*map(heading, shown), *(["of the bandwidth"] if reads else []), "load", "private memory"]
    rows = []
    for engine, found in engines.items():
        cells = [figure(found[name]) if name in found else "" for name in shown]
        if reads:
            reached = (found.get(f"decode {context}", 0) * size / bandwidth for context, size in reads.items())
            exact = (found.get(f"fraction {context}") for context in reads)  # of the same round
            shares = [e or r for e, r in zip(exact, reached, strict=True)]
            cells.append(" / ".join(f"{share:.0%}" if share else "" for share in shares))
        cells.append(f"{found['load']:.2f} s" if "load" in found else "")
        memory = [found[name] for name in ("private loaded", "private decoding") if name in found]
        cells.append(" / ".join(f"{size / 1e6:,.0f} MB" for size in memory))
        rows.append([engine, *cells])
    text = markdown(["tok/s", *columns], rows)
    # the best of ours against the best of theirs, and each of ours against the same instructions
    pairs = [(ours[0], "llama.cpp native"), *((name, alike(name)) for name in ours), (ours[0], "Candle")]
    ratios = [
        [f"{name} / {other}", *(ratio(engines[name], engines[other], speed) for speed in shown)]
        for name, other in pairs
        if other in engines
    ]
    return text + ("\n" + markdown(["ratio", *map(heading, shown)], ratios) if ratios else "")


def heading(speed: str) -> str:
    kind, n = speed.split()
    return speed if kind == "prefill" else "decode" if n == "0" else f"decode at {n}"


def ratio(mine: Mapping[str, float], other: Mapping[str, float], speed: str) -> str:
    return f"{mine[speed] / other[speed]:.2f}" if speed in mine and speed in other else ""


def alike(name: str) -> str:
    """llama.cpp for the instructions of one of our kernels."""
    return f"llama.cpp {name.split()[-1]}"


def figure(value: float) -> str:
    """Three significant digits, and never fewer than those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows])


STYLE = """
    .card { fill: #ffffff } text { fill: #24292f } .ours { fill: #1a7f5a } .peer { fill: #9aa4af }
    .limit { stroke: #cf222e } .limit-text { fill: #cf222e }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117 } text { fill: #e6edf3 } .ours { fill: #3fb68b } .peer { fill: #6e7681 }
      .limit { stroke: #ff7b72 } .limit-text { fill: #ff7b72 }
    }
    text { font: 13px system-ui, sans-serif } .title { font-weight: 600 } .small { font-size: 11px }
"""


def chart(engines: Figures, ours: list[str], reads: Mapping[int, int], caption: str) -> str:
    """Horizontal bars, a panel for each speed, as a self-contained SVG for light and dark pages."""
    label, bar, step, width = 190, 380, 22, 680
    bandwidth = engines[ours[0]]["bandwidth"]
    drawn: list[str] = []
    y = 16
    for speed in speeds(engines[ours[0]]):
        shown = {engine: found[speed] for engine, found in engines.items() if speed in found}
        kind, n = speed.split()
        limit = bandwidth / reads[int(n)] if kind == "decode" and int(n) in reads else None
        scale = bar / max(*shown.values(), limit or 0.0, 1e-9)
        y += 14
        drawn.append(f'<text class="title" x="16" y="{y}">{escape(heading(speed))}, tok/s</text>')
        top = y + 8
        for engine, value in shown.items():
            y += step
            long, whose = max(value * scale, 1), "ours" if engine in ours else "peer"
            drawn.append(f'<text x="{label - 8}" y="{y}" text-anchor="end">{escape(engine)}</text>')
            drawn.append(f'<rect class="{whose}" x="{label}" y="{y - 12}" width="{long:.1f}" height="15" rx="2"/>')
            drawn.append(f'<text x="{label + long + 6:.1f}" y="{y}">{figure(value)}</text>')
        if limit:
            x = label + limit * scale
            drawn.append(f'<path class="limit" d="M{x:.1f} {top}V{y + 6}" stroke-width="1.5" stroke-dasharray="4 3"/>')
            words = f"the limit of memory: {figure(limit)}"
            drawn.append(f'<text class="small limit-text" x="{x:.1f}" y="{top - 4}" text-anchor="end">{words}</text>')
        y += step
    drawn.append(f'<text class="small" x="16" y="{y + 4}">{escape(caption)}</text>')
    height = y + 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(caption)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="card" width="{width}" height="{height}" rx="8"/>',
            *drawn,
            "</svg>\n",
        ]
    )
