"""Pictures of what happens inside a composition: plain values in, a matplotlib Figure out.

Colours are Okabe and Ito's, told apart with any colour vision; adapters beyond the eighth are refused, since no ninth
colour is. Figures stand by themselves: no backend is chosen, and pyplot is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, the strong colours first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
REST = "#E8E8E8"  # what does not act
GAP = 0.7  # between clusters, in widths of a rank
SHOWN_LAYERS = 6  # about so many layers are numbered

Panel = Sequence[tuple[ArrayLike, ArrayLike]]
"""One (owner (R,), labels (R,)) per layer."""


def rank_clusters(panels: Mapping[str, Panel], names: Sequence[str], *, title: str = "") -> Figure:
    """Which adapters' ranks share a cluster: a cell is a rank, coloured by its adapter; a block of cells is a cluster.

    One panel per module name, one row per layer, first layer on top. Clusters that hold ranks of most adapters stand
    left, so a row that begins with many-coloured blocks merges adapters, and one of plain blocks keeps them apart.

    Args:
        panels: title of the panel -> for each layer the adapter and the cluster of each rank, as integers from 0.
        names: of the adapters, by their number.
        title: above all panels.

    Raises:
        ValueError: no panel, owners and labels of different lengths, or more than eight adapters.
    """
    from matplotlib.patches import Patch

    figure, grid = _figure(len(panels), max((len(p) for p in panels.values()), default=0), names, width=4.3, row=0.13)
    for axes, (heading, layers) in zip(grid, panels.items(), strict=True):
        widest = max(_draw_clusters(axes, y, owner, labels) for y, (owner, labels) in enumerate(layers))
        axes.set_xlim(-0.3, widest + 0.3)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_title(heading, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks(_some(len(layers)))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    grid[0].set_ylabel("layer")
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, COLOURS, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def gate_heat_map(
    values: ArrayLike,
    names: Sequence[str],
    tokens: Sequence[str],
    *,
    meaning: str = "share of the adapter",
    limits: tuple[float, float] = (0.0, 1.0),
    title: str = "",
) -> Figure:
    """What a gate lets pass of each adapter, layer by layer and token by token: one panel per adapter.

    Args:
        values: (adapters, layers, tokens); nan where an adapter has no rank.
        names: of the adapters.
        tokens: their texts.
        meaning: what a value is, beside the scale.
        limits: values of the darkest and the lightest colour; what lies outside takes the nearest colour.
        title: above all panels.

    Raises:
        ValueError: values of another shape than names and tokens say, or no adapter.
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 3 or array.shape[0] != len(names) or array.shape[2] != len(tokens) or not array.size:
        raise ValueError(f"values must be ({len(names)}, layers, {len(tokens)}), got {array.shape}")
    width = 0.17 * len(tokens) + (0.5 if len(names) > 1 else 1.2)
    figure, grid = _figure(len(names), array.shape[1], (), width=width, row=0.11)
    for axes, name, own in zip(grid, names, array, strict=True):
        image = axes.imshow(own, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="none")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(tokens)), [plain_token(token) for token in tokens], rotation=90, fontsize=7)
        axes.set_yticks(_some(array.shape[1]))
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
    grid[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(grid), label=meaning, fraction=0.02, pad=0.015)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def acting_ranks(
    values: ArrayLike, owner: ArrayLike, names: Sequence[str], tokens: Sequence[str], *, title: str = ""
) -> Figure:
    """Which ranks act on which token in one module: a cell is coloured by the rank's adapter where its gate is open.

    Args:
        values: multipliers (ranks, tokens); 0 does not act.
        owner: adapter of each rank, (ranks,).
        names: of the adapters, by their number.
        tokens: their texts.
        title: above the picture.

    Raises:
        ValueError: shapes that do not belong together, or more than eight adapters.
    """
    array, whose = np.asarray(values, dtype=float), np.asarray(owner, dtype=int)
    if array.shape != (len(whose), len(tokens)) or not array.size:
        raise ValueError(f"values must be ({len(whose)}, {len(tokens)}), got {array.shape}")
    order = np.argsort(whose, kind="stable")
    array, whose = array[order], whose[order]
    figure, (axes,) = _figure(1, len(whose), names, width=0.2 * len(tokens) + 1.4, row=0.14)
    for rank, token in np.ndindex(array.shape):
        colour = COLOURS[whose[rank]] if array[rank, token] != 0 else REST
        axes.add_patch(_box(token, rank, 0.9, 0.84, colour))
    axes.set_xlim(-0.6, len(tokens) - 0.4)
    axes.set_ylim(len(whose) - 0.4, -0.6)
    axes.set_xticks(range(len(tokens)), [plain_token(token) for token in tokens], rotation=90, fontsize=8)
    middles = [np.flatnonzero(whose == adapter).mean() for adapter in np.unique(whose)]
    axes.set_yticks(middles, [names[adapter] for adapter in np.unique(whose)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10, loc="left")
    return figure


def plain_token(token: str) -> str:
    """A token as people read it: the marks that byte-level tokenizers write for spaces and line ends are replaced."""
    return token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "↵").replace("\n", "↵").strip() or "␣"


def _draw_clusters(axes: Any, y: int, owner: ArrayLike, labels: ArrayLike) -> float:
    """One layer's row; returns how far it reaches."""
    whose, cluster = np.asarray(owner, dtype=int), np.asarray(labels, dtype=int)
    if whose.shape != cluster.shape or whose.ndim != 1 or not whose.size:
        raise ValueError(f"layer {y}: owner and labels must be (R,) each, got {whose.shape} and {cluster.shape}")
    blocks = [np.sort(whose[cluster == label]) for label in np.unique(cluster)]
    blocks.sort(key=lambda block: (-len(np.unique(block)), -len(block), block.tolist()))
    x = 0.0
    for block in blocks:
        for adapter in block:
            axes.add_patch(_box(x + 0.5, y, 1.0, 0.8, COLOURS[adapter]))
            x += 1
        x += GAP
    return x - GAP


def _box(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor="white", linewidth=0.3)


def _some(count: int) -> list[int]:
    return list(range(0, count, max(1, round(count / SHOWN_LAYERS))))


def _figure(
    panels: int, rows: int, names: Sequence[str], *, width: float, row: float
) -> tuple[Figure, NDArray[np.object_]]:
    """A figure of panels side by side that share their vertical axis, sized by its content in inches."""
    if panels < 1:
        raise ValueError("there is nothing to draw: give at least one panel")
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} adapters cannot be told apart by colour; draw at most {len(COLOURS)} at once")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need the package matplotlib: pip install 'loracompose[eval]'") from error
    figure = Figure(figsize=(width * panels, row * rows + 1.3), dpi=100, layout="constrained")
    grid = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    return figure, grid
