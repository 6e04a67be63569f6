"""What a picture shows is what it was given: every rank in its adapter's colour, every value in its cell."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex

from loracompose.evaluation.pictures import (
    COLOURS,
    REST,
    acting_ranks,
    gate_heat_map,
    plain_token,
    rank_clusters,
)

NAMES = ("sql", "french", "sums")


def cells(axes):
    """Row -> (left edge, colour) of its cells from left to right."""
    rows = {}
    for box in axes.patches:
        rows.setdefault(round(box.get_y() + box.get_height() / 2), []).append(
            (box.get_x(), to_hex(box.get_facecolor()))
        )
    return {y: sorted(row) for y, row in rows.items()}


def blocks(row):
    """Colours of the cells that touch, block by block."""
    found = [[row[0][1]]]
    for (before, _), (x, colour) in itertools.pairwise(row):
        if x - before > 1.01:
            found.append([])
        found[-1].append(colour)
    return found


def colours(*adapters):
    return [COLOURS[adapter].lower() for adapter in adapters]


def drawn(figure):
    """The figure as PNG, so that it is known to draw."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def test_a_rank_is_a_cell_of_its_adapters_colour_and_a_cluster_is_a_block_the_most_mixed_first():
    layers = [([0, 0, 1, 1, 2], [4, 0, 0, 2, 0]), ([2, 1, 0], [0, 1, 1])]
    figure = rank_clusters({"q_proj": layers, "v_proj": [([1], [0])]}, NAMES, title="a merge")
    first, second = figure.axes
    rows = cells(first)
    assert blocks(rows[0]) == [colours(0, 1, 2), colours(0), colours(1)]
    assert blocks(rows[1]) == [colours(0, 1), colours(2)]
    assert blocks(cells(second)[0]) == [colours(1)]
    assert (first.get_title(), second.get_title()) == ("q_proj", "v_proj")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(NAMES)
    assert [to_hex(patch.get_facecolor()) for patch in legend.get_patches()] == colours(0, 1, 2)
    assert first.get_ylim()[0] > first.get_ylim()[1]  # the first layer on top
    assert drawn(figure)


def test_a_heat_map_has_a_panel_an_adapter_and_a_cell_a_layer_and_token():
    values = np.arange(24, dtype=float).reshape(3, 2, 4)
    values[1, 0, 2] = np.nan
    figure = gate_heat_map(values, NAMES, ["ĠHow", "many", "Ċ", "?"], limits=(0.0, 30.0), meaning="multiplier")
    panels, bar = figure.axes[:3], figure.axes[3]
    assert [axes.get_title() for axes in panels] == list(NAMES)
    for axes, own in zip(panels, values, strict=True):
        (image,) = axes.images
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), own)
        assert image.get_clim() == (0.0, 30.0)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["How", "many", "↵", "?"]
    assert bar.get_ylabel() == "multiplier"
    assert drawn(figure)


def test_a_rank_that_acts_on_a_token_has_its_adapters_colour_and_any_other_is_grey():
    values = np.array([[0.5, 0.0], [0.0, -0.1], [0.3, 0.3]])
    figure = acting_ranks(values, [1, 0, 1], NAMES, ["a", "b"])  # drawn adapter by adapter: rank 1, then 0 and 2
    rows = {y: [colour for _, colour in row] for y, row in cells(figure.axes[0]).items()}
    grey, sql, french = REST.lower(), *colours(0, 1)
    assert rows == {0: [grey, sql], 1: [french, grey], 2: [french, french]}
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["sql", "french"]
    assert drawn(figure)


def test_colours_differ_and_a_ninth_adapter_is_refused():
    assert len(set(COLOURS)) == len(COLOURS) == 8
    with pytest.raises(ValueError, match="9 adapters"):
        rank_clusters({"q": [([0], [0])]}, [str(i) for i in range(9)])


@pytest.mark.parametrize("token", ["", " ", "Ġ", "▁"])
def test_no_token_is_drawn_as_nothing(token):
    assert plain_token(token) == "␣"
    assert plain_token("\n") == "↵"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: rank_clusters({}, NAMES), "nothing to draw"),
        (lambda: rank_clusters({"q": [([0, 1], [0])]}, NAMES), "layer 0"),
        (lambda: gate_heat_map(np.zeros((2, 3, 4)), NAMES, ["a"] * 4), r"\(3, layers, 4\), got \(2, 3, 4\)"),
        (lambda: gate_heat_map(np.zeros((3, 0, 4)), NAMES, ["a"] * 4), "layers"),
        (lambda: acting_ranks(np.zeros((2, 3)), [0, 0], NAMES, ["a"]), r"\(2, 1\), got \(2, 3\)"),
    ],
)
def test_values_that_do_not_belong_together_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
