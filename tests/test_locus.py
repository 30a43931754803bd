"""The locus figure: every panel at the right place, nothing overlapping, nothing invented."""

import numpy as np
import pandas as pd
import pytest

from seq2expr.locus import locus
from tests.test_plot import pixels

START, END = 1_000_000, 1_020_000
GENES = ["start", "end", "strand", "gene_name"]


def draw(**changes):
    genes = pd.DataFrame(
        [
            (START - 5000, START + 4000, "+", "LEFT"),
            (START + 8000, START + 10_000, "-", "OWN"),
            (START + 3000, START + 9000, "+", "MIDDLE"),
            (END, END + 50, "+", "OUTSIDE"),
        ],
        columns=GENES,
    )
    settings = {
        "chrom": "chr1", "start": START, "end": END, "tss": START + 9999, "strand": "-",
        "gene_name": "OWN", "tracks": {"DNase": np.arange(200.0)},
        "importance": {"mask": np.zeros(END - START)}, "genes": genes,
    }  # fmt: skip
    return locus(**(settings | changes))


def frame(columns, *rows):
    return pd.DataFrame(list(rows), columns=columns)


def steps(ax):
    (patch,) = [patch for patch in ax.patches if hasattr(patch, "get_data")]
    return patch.get_data()


def ticks(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def gene_labels(figure):
    return {text.get_text(): text for text in figure.axes[-1].texts}


def test_panels_share_one_axis_in_genomic_kb():
    regions = frame(["start", "end", "score"], (START + 100, START + 300, 0.5))
    elements = frame(["start", "end", "kind"], (START + 100, START + 300, "enhancer"))
    figure = draw(regions=regions, elements=elements, track_unit="fold change")
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "", "DNase\n(fold change)", "mask\n(importance)", "Called regions\n(score)", "Elements",
        "Genes",
    ]  # fmt: skip
    assert {ax.get_xlim() for ax in figure.axes} == {(1000.0, 1020.0)}
    assert figure.axes[-1].get_xlabel() == "Position on chr1 (kb)"
    figure.draw_without_rendering()
    assert "1,005" in [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    for ax in figure.axes:
        assert ax.lines[0].get_xdata()[0] == 1009.9995  # the middle of the TSS base
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["enhancer"]
    pixels(figure)


def test_a_track_is_drawn_in_genomic_order_bin_by_bin():
    data = steps(draw().axes[1])
    np.testing.assert_array_equal(data.values, np.arange(200.0))
    np.testing.assert_allclose(data.edges, np.arange(START, END + 1, 100) / 1e3)


def test_long_values_are_pooled_by_mean_or_by_largest_magnitude():
    values = np.zeros(END - START)
    values[5], values[27] = 10.0, -4.0
    values[40:50] = np.nan
    figure = draw(tracks={"signal": values}, importance={"ism": values})
    mean, largest = (steps(ax).values for ax in figure.axes[1:3])
    assert len(mean) == len(largest) == 2000
    np.testing.assert_array_equal(mean[:6], [1, 0, -0.4, 0, np.nan, 0])
    np.testing.assert_array_equal(largest[:6], [10, 0, -4, 0, np.nan, 0])


def test_an_uneven_last_bin_keeps_its_own_width():
    figure = draw(end=START + 4001, tracks={"signal": np.ones(4001)}, importance={})
    data = steps(figure.axes[1])
    np.testing.assert_array_equal(data.values, np.ones(1334))
    np.testing.assert_allclose(data.edges[-2:] * 1e3, [START + 3999, START + 4001])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 0.0], ["0", "1"]),
        ([np.nan, np.nan], ["0", "1"]),
        ([0.0, 0.5], ["0", "0.5"]),
        ([-0.02, 0.1], ["0", "−0.02", "0.1"]),
        ([-0.001, 0.1], ["0", "0.1"]),
        ([0.0, 12345.6], ["0", "12,346"]),
    ],
)
def test_value_axis_names_zero_and_the_extremes_that_are_apart(values, labels):
    figure = draw(tracks={}, importance={"ism": np.array(values)})
    assert ticks(figure.axes[1]) == labels
    figure.draw_without_rendering()


def test_values_that_do_not_fit_the_window_are_refused():
    with pytest.raises(ValueError, match=r"'DNase' has shape \(3,\).*20,000 bases"):
        draw(tracks={"DNase": np.zeros(3)})


def test_genes_outside_are_left_out_and_overlapping_ones_get_rows():
    labels = gene_labels(draw())
    assert set(labels) == {"LEFT", "MIDDLE", "OWN"}
    rows = {name: int(text.get_position()[1]) for name, text in labels.items()}
    assert rows == {"LEFT": 0, "MIDDLE": 1, "OWN": 0}
    assert labels["OWN"].get_weight() == "bold"


@pytest.mark.parametrize(("strand", "tip"), [("+", START + 9000), ("-", START + 3000)])
def test_a_gene_points_where_it_is_transcribed(strand, tip):
    genes = frame(GENES, (START + 3000, START + 9000, strand, "OWN"))
    (polygon,) = draw(genes=genes).axes[-1].patches
    assert polygon.get_xy()[2][0] == pytest.approx(tip / 1e3)


def test_names_of_crowded_genes_do_not_overlap_and_stay_inside():
    rows = [(START + 120 * i, START + 120 * i + 60, "+-"[i % 2], f"GENE{i}") for i in range(165)]
    figure = draw(genes=frame(GENES, *rows))
    figure.draw_without_rendering()
    ax = figure.axes[-1]
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 165
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert min(box.x0 for box in boxes) >= ax.bbox.x0
    assert max(box.x1 for box in boxes) <= ax.bbox.x1


def test_a_gene_without_a_name_and_no_genes_at_all():
    assert set(gene_labels(draw(genes=frame(GENES, (START, END, "+", np.nan))))) == {""}
    assert not gene_labels(draw(genes=frame(GENES)))


@pytest.mark.parametrize(
    ("strand", "tss", "ahead", "name_side"),
    [
        ("+", START + 9999, 1, 1),
        ("-", START + 9999, -1, -1),
        ("+", END - 10, 1, -1),
        ("-", START + 10, -1, 1),
    ],
)
def test_the_tss_arrow_points_ahead_and_its_name_keeps_inside(strand, tss, ahead, name_side):
    figure = draw(strand=strand, tss=tss)
    figure.draw_without_rendering()
    arrow, name = figure.axes[0].texts
    x = (tss + 0.5) / 1e3
    assert np.sign(arrow.xy[0] - x) == ahead
    assert name.get_text() == f"OWN TSS ({'−' if strand == '-' else '+'})"
    extent = name.get_window_extent()
    middle = figure.axes[0].transData.transform((x, 0))[0]
    assert np.sign((extent.x0 + extent.x1) / 2 - middle) == name_side
    assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1


def test_elements_are_coloured_by_kind_and_short_ones_widened_to_be_seen():
    kinds = [f"kind {i}" for i in range(9)]
    rows = [(START + 2000 * i, START + 2000 * i + 10, kind) for i, kind in enumerate(kinds)]
    figure = draw(elements=frame(["start", "end", "kind"], *rows))
    boxes = figure.axes[-2].patches
    assert {round(box.get_width() * 1e3) for box in boxes} == {50}  # 1/400 of 20 kb
    assert boxes[0].get_x() * 1e3 == pytest.approx(START + 5 - 25)
    assert len({(box.get_facecolor(), box.get_hatch()) for box in boxes}) == 9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == kinds


def test_regions_are_as_high_as_their_score():
    columns = ["start", "end", "score"]
    rows = [(START + 100, START + 500, 0.5), (START + 900, START + 1500, -1.0)]
    figure = draw(regions=frame(columns, *rows, (END + 1, END + 5, 9.0)))
    boxes = [
        (b.get_x() * 1e3, b.get_width() * 1e3, b.get_height()) for b in figure.axes[3].patches
    ]
    np.testing.assert_allclose(boxes, [(START + 100, 400, 0.5), (START + 900, 600, -1.0)])
    assert ticks(figure.axes[3]) == ["0", "−1", "0.5"]


def test_empty_tables_draw_empty_lanes():
    elements, regions = frame(["start", "end", "kind"]), frame(["start", "end", "score"])
    figure = draw(elements=elements, regions=regions, tracks={}, importance={})
    assert len(figure.axes) == 4
    assert not figure.legends
    figure.draw_without_rendering()
