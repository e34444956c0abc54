"""Draws what bench/evaluate.py wrote: frontier.png.

    python bench/plots.py                            # of out/eval.json, to out/pictures
    python bench/plots.py --evaluation=A/eval.json,B/eval.json --systems=GPT,TextLDM

It has NLL against entropy, a curve for each system and setting. All seeds of a system (`GPT 1`,
`GPT 2`) have one colour.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.metrics import curves_of, running
from engine.config import UserError, command_line
from engine.terminal import run_script
from textldm import option

INK, GREY = "#222222", "#9a9a9a"


@dataclass
class PlotConfig:
    out: str = option("out", "folder of eval.json, which bench/evaluate.py makes")
    evaluation: str = option("", "files to read, with commas (OUT/eval.json)")
    systems: str = option("", "which to draw, with commas (all; `a` is a 1, a 2 ..., too)")
    title: str = option("Nearer to real text is better", "of the picture")
    pictures: str = option("", "folder to write to (OUT/pictures)")


def frontier(plt, options):
    """NLL against entropy. Each point has its temperature, or its guidance scale, beside it."""
    points = {}
    for path in (options.evaluation or f"{options.out}/eval.json").split(","):
        if not Path(path).is_file():
            raise UserError(f"{path} is missing; bench/evaluate.py makes it")
        result = json.loads(Path(path).read_text())
        points |= result["frontier"]
    wanted = [name.strip() for name in options.systems.split(",") if name.strip()]
    figure, axes = plt.subplots(figsize=(7.6, 5))
    colors = {}
    for name in points:
        family = re.sub(r"\s+\d+$", "", name)  # without the number of the seed
        if wanted and not {name, family} & set(wanted):
            continue
        for curve in curves_of(points[name]):
            x = [point["entropy"] for point in curve]
            y = [point["nll"] for point in curve]
            label = None if family in colors else family
            (line,) = axes.plot(x, y, "o-", color=colors.get(family), label=label, markersize=4)
            colors[family] = line.get_color()
            for point, place in zip(curve, zip(x, y)):
                knob = point["knob"]
                offset = dict(xytext=(3, 3), textcoords="offset points", fontsize=7, color=GREY)
                axes.annotate(f"{knob[running(knob)]:g}", place, **offset)
    real = result["real"]
    axes.plot(real["entropy"], real["nll"], "*", color=INK, markersize=15, label="real text")
    axes.set(title=options.title, xlabel="entropy of the tokens, nats (left: repeats itself)")
    axes.set_ylabel("NLL by an independent GPT, nats per token (low: fluent)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    return figure


def main():
    (options,) = command_line(__doc__, PlotConfig)
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = Path(options.pictures or f"{options.out}/pictures") / "frontier.png"
    figure = frontier(plt, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
