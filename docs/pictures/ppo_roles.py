"""Draws ppo_roles.svg: who runs where in stage ppo on Ray, and what they say to each other.

python docs/pictures/ppo_roles.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DRIVER, WORKER, ACTOR, EDGE = "#e8e8e8", "#cfe3f7", "#fbe3c4", "#444444"


def box(axes, at, size, colour, title, *lines):
    """A rounded box with a title and lines of text."""
    (x, y), (width, height) = at, size
    shape = FancyBboxPatch(at, width, height, boxstyle="round,pad=0.06", fc=colour, ec=EDGE)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height - 0.2, title, ha="center", weight="bold", size=10)
    for number, line in enumerate(lines):
        axes.text(x + width / 2, y + height - 0.5 - 0.26 * number, line, ha="center", size=8.5)


def arrow(axes, start, end, text, at, *, both=False):
    """An arrow with a text at a place of its own."""
    style = {"arrowstyle": "<|-|>" if both else "-|>", "mutation_scale": 12, "color": EDGE}
    axes.add_patch(FancyArrowPatch(start, end, **style))
    axes.text(*at, text, size=8, ha="center", va="center", color=EDGE, backgroundcolor="white")


def main() -> None:
    """Draw the picture."""
    plt.rcParams["svg.fonttype"] = "none"  # text stays text
    plt.rcParams["svg.hashsalt"] = "ppo_roles"  # the same bytes at every drawing
    figure, axes = plt.subplots(figsize=(9.2, 5.6))
    told = ("places roles, shows progress, turns signals into a stop,", "kills what hangs")
    box(axes, (2.4, 5.0), (5.2, 1.0), DRIVER, "driver", *told)
    lines = ("policy + value head", "reference", "rollouts", "updates")
    for number, (x, name) in enumerate([(0.2, "worker, rank 0"), (2.3, "worker, rank 1")]):
        box(axes, (x, 1.6), (1.8, 1.65), WORKER, name, *lines)
        arrow(axes, (2.16, 2.3), (2.24, 2.3), "", (2.2, 2.3), both=True)
        for actor in range(2):
            end = (6.34, 2.95 - 1.3 * actor)
            arrow(axes, (4.16, 2.6 - 0.5 * number), end, "", end)
    for number, y in enumerate([2.3, 0.95]):
        title = f"reward model, actor {number}"
        has = ("own node, resources, tokenizer;", "batches across ranks")
        box(axes, (6.4, y), (3.2, 1.0), ACTOR, title, *has)
    below = {"ha": "center", "va": "top", "size": 8.5}
    axes.text(
        2.15, 1.3, "one group over gradients: restarts as\na whole from its checkpoint", **below
    )
    axes.text(8.0, 0.7, "restart one by one;\ntheir requests go to the others", **below)
    arrow(axes, (3.6, 4.9), (2.2, 3.4), "job, handles;\nlogs, checkpoints", (2.0, 4.25), both=True)
    arrow(axes, (6.6, 4.9), (8.0, 3.4), "makes, before the workers", (8.3, 4.25))
    axes.text(5.25, 3.1, "texts out,\nscores as futures", ha="center", size=8)
    also = "functions; requests to reward servers"
    box(axes, (0.2, -0.5), (3.9, 0.7), "#e2f0d9", "in the workers too", also)
    axes.set_xlim(-0.1, 10)
    axes.set_ylim(-0.8, 6.3)
    axes.axis("off")
    file = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, bbox_inches="tight", dpi=110, metadata=metadata)


if __name__ == "__main__":
    main()
