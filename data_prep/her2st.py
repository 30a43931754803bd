"""Fetch sections C2 to C5 and A1 of HER2+ breast tumours (Andersson 2021; almaan/her2st).

Counts, spot files and full-size H&E of C2 to C5, four cuts of one patient; of A1 a picture at
0.2876 of the size that its spots are placed on (spot_scale).

python data_prep/her2st.py --out data/her2st [--mirror DIR|URL]
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent))  # the shared part lies beside, also by path
from sections import MIRROR, run

MANIFEST = Path(__file__).with_name("her2st_manifest.yaml")


def main(
    out: Annotated[Path, typer.Option(help="Result folder.")] = Path("data/her2st"),
    mirror: Annotated[str | None, typer.Option("--mirror", "--from", help=MIRROR)] = None,
    manifest: Annotated[Path, typer.Option(help="Files and sources.")] = MANIFEST,
) -> None:
    """Fetch the HER2ST sections whose pictures are public."""
    run(out, manifest, mirror)


if __name__ == "__main__":
    typer.run(main)
