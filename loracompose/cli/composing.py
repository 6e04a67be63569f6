"""loracompose compose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from loracompose.cli import options, tables

if TYPE_CHECKING:
    from loracompose import Adapter


def compose(
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders; with --index names, or ./folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not exist.")],
    weights: Annotated[str | None, typer.Option("--weights", "-w", help="Such as 0.7,0.3; equal if not given.")] = None,
    index: options.Index = None,
    composer: options.ComposerName = "mixture",
    settings: options.Settings = None,
    router: options.Router = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Merge adapters into one plain PEFT adapter, with its recipe."""
    from loracompose import compose as merge
    from loracompose import load_adapter, save_adapter

    given = options.parse_weights(weights) if weights else None
    merged = merge(read_adapters(adapters, index), given, composer=options.parse_composer(composer, settings, router))
    save_adapter(merged, output, overwrite=overwrite)
    written = load_adapter(output)  # read back: the identity reported is that of the files
    recipe = dict(merged.recipe or {})
    if as_json:
        tables.show_json({"folder": str(output), "fingerprint": written.fingerprint, **recipe})
        return
    ranks = [f.rank for f in written.factors.values()]
    rows = [(escape(s["name"]), f"{s['weight']:.3f}", s["fingerprint"][:12]) for s in recipe["sources"]]
    out = tables.console()
    out.print(tables.table(escape(recipe["composer"]), ("source", "weight", "fingerprint"), rows, right=(1,)))
    out.print(
        f"{escape(str(output))}: {len(ranks)} modules, rank {max(ranks)}, {written.nbytes / 1e6:.1f} MB, "
        f"relative error against the weighted sum {recipe['relative_error']:.2g}"
    )


def read_adapters(names: list[str], index: Path | None) -> list[Adapter]:
    """The adapters of folders or, with an index, of names in it; a folder then needs a slash, as in the engine.

    Raises:
        LookupError: a name that the index does not have.
        FileNotFoundError: a folder that is not there.
        ValueError: an adapter that cannot be read, or whose folder has changed since it was indexed.
    """
    import torch

    from loracompose import AdapterIndex, load_adapter
    from loracompose.adapters.store import AdapterStore
    from loracompose.lookup import look_up
    from loracompose.membership import from_hand

    if index is None:
        return [load_adapter(Path(name)) for name in names]
    with AdapterIndex.open(index) as opened:
        loaded, _ = look_up(from_hand([names], 1), AdapterStore(), opened, torch.device("cpu"))
    return [loaded[name] for name in names]
