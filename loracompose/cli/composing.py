"""loracompose compose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracompose.cli import options, tables


def compose(
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders, or names in the index.")],
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
    from loracompose import AdapterIndex, load_adapter, save_adapter
    from loracompose import compose as merge

    opened = AdapterIndex.open(index) if index else None
    folders = [opened.path(name) if opened is not None and name in opened else Path(name) for name in adapters]
    given = options.parse_weights(weights) if weights else None
    loaded = [load_adapter(folder) for folder in folders]
    merged = merge(loaded, given, composer=options.parse_composer(composer, settings, router))
    save_adapter(merged, output, overwrite=overwrite)
    written = load_adapter(output)  # read back: the identity reported is that of the files
    recipe = dict(merged.recipe or {})
    if as_json:
        tables.show_json({"folder": str(output), "fingerprint": written.fingerprint, **recipe})
        return
    ranks = [f.rank for f in written.factors.values()]
    rows = [(s["name"], f"{s['weight']:.3f}", s["fingerprint"][:12]) for s in recipe["sources"]]
    out = tables.console()
    out.print(tables.table(recipe["composer"], ("source", "weight", "fingerprint"), rows, right=(1,)))
    out.print(
        f"{output}: {len(ranks)} modules, rank {max(ranks)}, {written.nbytes / 1e6:.1f} MB, "
        f"relative error against the weighted sum {recipe['relative_error']:.2g}"
    )
