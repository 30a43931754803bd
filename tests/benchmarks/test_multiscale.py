"""TRIPLEX at its published size: what a training step costs, by spots of the batch and the slide.

Data are random; what they say changes nothing. Times are of the processor, the shorter of two
turns; a batch is of one slide, so that the slide is read once.
"""

import time

import pytest
import torch

from seq2expr.config import load_run_config
from seq2expr.systems.triplex import Triplex, TriplexConfig

GENES = 250
BATCHES = (8, 16, 32)
SLIDES = (350, 700, 1400)
"""Spots of a section of HER2ST, and two and four times as many."""

WIDTH, TILES, ROW = 512, 25, 40
TOKENS = (49, WIDTH)


def published():
    settings = load_run_config("triplex", data="data_her2st", overrides=["preset=published"])
    torch.manual_seed(0)
    names = [f"g{number}" for number in range(GENES)]
    return Triplex(TriplexConfig(targets=names, **settings.model)).train()


def fields(rows, slide, *, kept=False):
    """Return a batch of the first rows of a slide; ``kept`` features stand in for the patches."""
    random = torch.Generator().manual_seed(0)
    number = torch.arange(slide)
    shown = {"patch": torch.randint(0, 256, (rows, 224, 224, 3), generator=random).byte()}
    if kept:
        shown = {"spot_tokens": torch.randn(rows, *TOKENS, generator=random)}
    return {
        "ids": [str(row) for row in range(rows)],
        **shown,
        "window_tokens": torch.randn(rows, TILES, WIDTH, generator=random),
        "window_mask": torch.ones(rows, TILES, dtype=torch.bool),
        "slide_tokens": torch.randn(slide, WIDTH, generator=random),
        "slide_grid": torch.stack([number % ROW, number // ROW], dim=1),
        "slide_offsets": torch.tensor([0, slide]),
        "slide_row": number[:rows],
        "target": torch.randn(rows, GENES, generator=random),
        "target_mask": torch.ones(rows, GENES, dtype=torch.bool),
    }


def seconds(system, optimiser, batches):
    """Time a step with each of some batches, by their names."""
    best = {}
    for turn in range(3):  # the first one warms up
        for name, batch in batches.items():
            begin = time.process_time()
            system(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            taken = time.process_time() - begin
            if turn:
                best[name] = min(best.get(name, float("inf")), taken)
    return best


@pytest.fixture(scope="module")
def trained():
    system = published()
    return system, torch.optim.Adam(system.parameters(), lr=1e-4)


def test_a_step_is_linear_in_spots(benchmark, one_thread, report, trained):
    batches = {rows: fields(rows, SLIDES[0]) for rows in BATCHES}
    best = benchmark.pedantic(seconds, (*trained, batches), rounds=1)
    (few, some, many), times = BATCHES, list(best.values())
    first, further = (times[1] - times[0]) / (some - few), (times[2] - times[1]) / (many - some)
    told = ", ".join(f"{taken:.2f} s of {rows}" for rows, taken in best.items())
    report(
        f"triplex as published, a training step in a slide of {SLIDES[0]} spots, one thread: "
        f"{told}; {1000 * first:.0f} ms for each spot from {few} to {some}, "
        f"{1000 * further:.0f} ms from {some} to {many} (ratio {further / first:.2f})"
    )
    assert further / first < 1.5  # time that grew with the square would give 2


def test_a_slide_costs_as_its_spots_do(benchmark, one_thread, report, trained):
    batches = {slide: fields(8, slide, kept=True) for slide in SLIDES}
    best = benchmark.pedantic(seconds, (*trained, batches), rounds=1)
    told = ", ".join(f"{taken:.2f} s of {slide:,}" for slide, taken in best.items())
    report(f"triplex as published, a training step of 8 kept spots by spots of the slide: {told}")
    # Attention grows with the square, but is a small part of it at this size.
    assert best[SLIDES[-1]] / best[SLIDES[0]] < 1.6 * SLIDES[-1] / SLIDES[0]
