"""The figures of the report, as PNG files that are the same for the same numbers.

matplotlib comes with the extra `nano`, and nothing but this module imports it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.arithmetic import FACTORS, WITH, WITHOUT, Results

Series = NDArray[np.float64]  # [num_steps]

_DPI = 100
_COLOURS = ("#0072B2", "#D55E00", "#009E73")  # told apart with any kind of colour vision (Okabe and Ito)
_WINDOW = 25  # steps


def draw(results: Results, folder: Path) -> None:
    """Writes `loss.png`, `factors.png` and `load.png` into the folder."""
    runs = {WITH: results.balanced, WITHOUT: results.unbalanced}
    draw_loss({name: run.log["loss"] for name, run in runs.items()}, folder / "loss.png")
    draw_factors(
        {title: {name: run.log[factor] for name, run in runs.items()} for factor, title in FACTORS.items()},
        folder / "factors.png",
    )
    after = f"after {results.unbalanced.num_steps} steps"
    draw_load(
        {
            f"{WITH}, {after}": results.relative_load("balanced"),
            f"{WITHOUT}, {after}": results.relative_load("unbalanced"),
        },
        results.layers,
        num_devices=results.config["n_group"],
        file=folder / "load.png",
    )


def draw_loss(losses: Mapping[str, Series], file: Path) -> None:
    """Loss by step of each run by name: every step faintly, and the mean over the last _WINDOW steps."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    _draw_series(axes, losses)
    axes.set(title=f"Training loss, and its mean over {_WINDOW} steps", xlabel="step", ylabel="nats per token")
    axes.legend(frameon=False)
    _save(figure, file)


def draw_factors(factors: Mapping[str, Mapping[str, Series]], file: Path) -> None:
    """A panel for each balance factor by name, and in it a line for each run by name."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, len(factors), squeeze=False)[0]
    for axes, (title, runs) in zip(panels, factors.items()):
        _draw_series(axes, runs)
        axes.axhline(1.0, color="0.3", linewidth=1, linestyle=":")
        axes.set(title=title, xlabel="step")
    panels[0].set_ylabel("factor, mean over layers (1 is even)")
    panels[0].legend(frameon=False)
    _save(figure, file)


def draw_load(panels: Mapping[str, Series], layers: Sequence[int], *, num_devices: int, file: Path) -> None:
    """Heatmaps on one colour scale, one below the other.

    panels: by title, [num_layers, num_experts] load over mean load; layers: [num_layers] what to call them.
    Lines part the experts of one device from the next one's.
    """
    figure = Figure(figsize=(9, 1.4 + 1.9 * len(panels)), layout="constrained")
    highest = max(float(load.max()) for load in panels.values())
    rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    image = None
    for axes, (title, load) in zip(rows, panels.items()):
        image = axes.imshow(load, cmap="cividis", vmin=0.0, vmax=highest, aspect="auto", interpolation="nearest")
        num_experts = load.shape[1]
        for device in range(1, num_devices):
            axes.axvline(device * num_experts / num_devices - 0.5, color="white", linewidth=1.5)
        axes.set(title=title, xlabel="expert", ylabel="layer")
        axes.set_xticks(range(0, num_experts, max(num_experts // num_devices, 1)))
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    assert image is not None, "no panels"
    figure.colorbar(image, ax=list(rows), label="load / mean load (1 is even)")
    _save(figure, file)


def _draw_series(axes: Axes, runs: Mapping[str, Series]) -> None:
    for colour, (name, values) in zip(_COLOURS, runs.items()):
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.6)
        axes.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=name)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: Series) -> Series:
    """[num_steps] the mean of the last _WINDOW values, or of as many as there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - _WINDOW, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # No version and no date inside: the same numbers give the same file.
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
