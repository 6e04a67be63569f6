"""The figures of the measurements of speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

OURS, OTHERS, BASE = "#0072B2", "#999999", "#000000"  # told apart with any colour vision, and in print
STAGE_COLOURS = {"retrieve": "#E69F00", "load": "#009E73", "compose": "#D55E00", "generate": "#BBBBBB"}
MEMORY = (
    ("peak_mb", "o-", OURS, "process, at its peak"),
    ("model_mb", "--", BASE, "process, before it served"),
    ("store_mb", "s-", "#D55E00", "adapters in the store"),
)
PASSES = {"anew": "sets composed anew", "again": "sets composed before"}


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw a result of `measure.measure`: every way on the first case, and ours beside the others on all.

    Raises:
        ImportError: matplotlib is missing.
    """
    several = len(result["cases"]) > 1

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, 2, width_ratios=(1.3, 1)) if several else [figure.subplots()]
        name, first = next(iter(result["cases"].items()))
        _ways(axes[0], name, first)
        if several:
            _cases(axes[1], result["cases"])

    _save(file, (12 if several else 9, 4.8), paint)


def draw_composing(result: Mapping[str, Any], file: Path) -> None:
    """Draw a result of `composing.measure`: what one set costs by each method, and by scikit-learn and PEFT.

    Raises:
        ImportError: matplotlib is missing.
    """
    effort = next(iter(result["lego"]["efforts"].values()))
    bars = [(name, part, OURS) for name, part in result["seconds"].items()]
    bars += [
        ("LEGO's clustering alone", effort["seconds"], OURS),
        ("LEGO's clustering by scikit-learn", result["lego"]["sklearn_seconds"], OTHERS),
        ("PEFT add_weighted_adapter(svd), for linear", result["linear"]["peft_seconds"], OTHERS),
    ]
    bars.sort(key=lambda bar: bar[1]["median"])

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for place, (_, part, colour) in enumerate(bars):
            error = [[part["median"] - part["low"]], [part["high"] - part["median"]]]
            axes.errorbar(part["median"], place, xerr=error, fmt="o", color=colour, ms=6, capsize=2)
            axes.annotate(
                _seconds(part["median"]), (part["high"], place), (7, -3), textcoords="offset points", color=colour
            )
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel(f"seconds to compose {result['adapters']} adapters on {result['modules']} modules")

    _save(file, (9, 4.4), paint)


def draw_stream(result: Mapping[str, Any], file: Path) -> None:
    """Draw a result of `stream.measure`: throughput, and where memory and time go, over the size of the pool.

    Raises:
        ImportError: matplotlib is missing.
    """
    pools = {int(size): part for size, part in result["pools"].items()}
    sizes = sorted(pools)

    def paint(figure: Any) -> None:
        rate, memory = figure.subplots(1, 2)
        rate.plot(sizes, [pools[size]["prompts_a_second"] for size in sizes], "o-", color=OURS)
        rate.set_ylabel("prompts a second")
        for part, style, colour, label in MEMORY:
            memory.plot(sizes, [pools[size][part] for size in sizes], style, color=colour, label=label)
        memory.set_ylabel("MB")
        memory.legend(frameon=False, fontsize=8)
        for axes in (rate, memory):
            axes.set_xscale("log")
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
            axes.grid(alpha=0.3)
            axes.set_xlabel("adapters on disk")

    _save(file, (9, 3.4), paint)


def draw_answers(result: Mapping[str, Any], file: Path) -> None:
    """Draw a result of `answers.measure`: the stages of a batch by composer, sets composed anew and composed before.

    Raises:
        ImportError: matplotlib is missing.
    """
    composers = result["composers"]

    def paint(figure: Any) -> None:
        for axes, (key, title) in zip(figure.subplots(1, 2, sharex=True, sharey=True), PASSES.items(), strict=True):
            for place, passes in enumerate(composers.values()):
                part, left = passes[key], 0.0
                for stage, seconds in part["seconds"].items():
                    label = stage if place == 0 else None
                    axes.barh(place, seconds["median"], left=left, color=STAGE_COLOURS[stage], label=label, height=0.7)
                    left += seconds["median"]
                share = f"{part['share_before_the_model']['median']:.1%}"
                axes.annotate(share, (left, place), (4, -3), textcoords="offset points", fontsize=8)
            axes.set_yticks(range(len(composers)), list(composers))
            axes.set_title(title, loc="left", fontsize=9)
            axes.margins(x=0.14)
            axes.grid(axis="x", alpha=0.3)
            axes.set_xlabel("seconds a batch; in numbers: all that comes before the model")
        axes.invert_yaxis()
        axes.legend(frameon=False, fontsize=8, loc="lower right")

    _save(file, (10, 3.8), paint)


def _save(file: Path, size: tuple[float, float], paint: Callable[[Any], None]) -> None:
    """Paint and write; equal results give equal files."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'loracompose[bench]'") from error
    with rc_context({"svg.hashsalt": "loracompose", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _seconds(value: float) -> str:
    return f"{1000 * value:,.1f} ms" if value < 1 else f"{value:,.1f} s"


def _ways(axes: Any, title: str, case: Mapping[str, Any]) -> None:
    ways = {name: way for name, way in case["ways"].items() if name != "base model"}
    ordered = sorted(ways, key=lambda name: ways[name]["ratio_to_base"]["decode"]["median"])
    for place, name in enumerate(ordered):
        ratios = ways[name]["ratio_to_base"]
        colour = OURS if name.startswith("loracompose") else OTHERS
        for phase, marker, shift in (("decode", "o", -0.13), ("first_token", "s", 0.13)):
            r = ratios[phase]
            error = [[r["median"] - r["low"]], [r["high"] - r["median"]]]
            fill = colour if phase == "decode" else "white"
            axes.errorbar(r["median"], place + shift, xerr=error, fmt=marker, color=colour, mfc=fill, ms=5, capsize=2)
    axes.axvline(1, color=BASE, lw=1)
    axes.set_yticks(range(len(ordered)), [_label(name, ways[name]) for name in ordered])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 4, 8, 16, 32], ["1", "1.5", "2", "4", "8", "16", "32"], minor=False)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "time over that of the base model (filled: a decoding step, open: the first token)\n"
        "* does not compute each row's weighted sum"
    )
    axes.set_title(title, loc="left")


def _label(name: str, way: Mapping[str, Any]) -> str:
    return name if way["computes"] == "the mixture" else f"{name} *"


def _cases(axes: Any, cases: Mapping[str, Any]) -> None:
    names = list(cases)
    cat = "PEFT add_weighted_adapter(cat), then adapter_names"
    shown = (
        ("loracompose", "loracompose, k adapters a row", OURS, "o"),
        ("PEFT adapter_names, one adapter a row", "PEFT adapter_names, one adapter a row", "#E69F00", "s"),
        (cat, "PEFT merged by cat", "#009E73", "^"),
        ("LoraRetriever's einsum, mixture", "LoraRetriever's einsum", "#CC79A7", "D"),
    )
    for way, label, colour, marker in shown:
        points = [(place, cases[name]["ways"][way]) for place, name in enumerate(names) if way in cases[name]["ways"]]
        x = [found["ratio_to_base"]["decode"]["median"] for _, found in points]
        axes.plot(x, [place for place, _ in points], marker, color=colour, label=label, ms=6, alpha=0.9)
    axes.axvline(1, color=BASE, lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"], minor=False)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("decoding step / base")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.15, 1.0))
