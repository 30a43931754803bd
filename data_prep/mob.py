"""Fetch two sections of mouse olfactory bulb (Ståhl 2016), as STUtility has them: 1,000 genes.

The files say no scale; the data file must declare it (nominally 4.36 um per pixel).

python data_prep/mob.py --out data/mob [--mirror DIR|URL]
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent))  # the shared part lies beside, also by path
from sections import MIRROR, run

MANIFEST = Path(__file__).with_name("mob_manifest.yaml")


def main(
    out: Annotated[Path, typer.Option(help="Result folder.")] = Path("data/mob"),
    mirror: Annotated[str | None, typer.Option("--mirror", "--from", help=MIRROR)] = None,
    manifest: Annotated[Path, typer.Option(help="Files and sources.")] = MANIFEST,
) -> None:
    """Fetch the sections MOB1 and MOB2."""
    run(out, manifest, mirror)


if __name__ == "__main__":
    typer.run(main)
