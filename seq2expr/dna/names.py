"""Chromosome names: the same chromosome is I, chrI, 1 or chr1 in files of different origin."""

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

from seq2expr.errors import Seq2ExprWarning, UserError

_MITOCHONDRIAL = {"m", "mt", "mito", "mtdna", "mitochondrion"}
_ROMAN = re.compile(r"(x{0,3})(ix|iv|v?i{0,3})")


def suggest_mapping(wanted: Collection[str], present: Collection[str]) -> dict[str, str]:
    """Guess which names of two files mean the same chromosome.

    Two names agree when they are equal after dropping a leading ``chr``, case and leading zeros,
    with M, MT, Mito, MtDNA as one. What is left over agrees also when one side counts in Roman
    numerals (it has II, III, ... and no Arabic number) and the other in Arabic ones; X is tried
    as a name before it is tried as ten, so worm and human X stay X. A name that fits several of
    ``present`` and equals none of them is left out.

    Returns
    -------
    wanted name -> present name, for the names that were matched.
    """
    mapping = {name: name for name in wanted if name in set(present)}
    _match(wanted, present, mapping, _plain, _plain)
    if _counts_roman(wanted) and not _counts_roman(present):
        _match(wanted, present, mapping, _arabic, _plain)
    elif _counts_roman(present) and not _counts_roman(wanted):
        _match(wanted, present, mapping, _plain, _arabic)
    return {name: mapping[name] for name in wanted if name in mapping}


def resolve_names(
    wanted: Collection[str],
    present: Collection[str],
    *,
    what: str,
    chrom_map: Mapping[str, str] | Literal["auto"] | None = None,
) -> dict[str, str]:
    """Translate chromosome names into those of another file.

    A chromosome that the other file simply lacks (a scaffold without a track) is left out of the
    result, which is what the caller reports; another spelling of the names is an error, since it
    would turn a whole track into zeros. It counts as another spelling when no name is found, or
    when two or more of the names not found would be under :func:`suggest_mapping`. A single one
    (usually the mitochondrion) is a warning. So pass the names of the whole file, not those of
    the few genes asked for.

    Parameters
    ----------
    wanted
        Names used by the caller, usually those of the genome.
    present
        Names of the other file; none at all gives an empty result.
    what
        The other file, as it should stand in the message.
    chrom_map
        ``"auto"`` applies :func:`suggest_mapping`. A mapping is read in both directions: of a
        name, what it maps to, what maps to it, and the name itself, the first one present is
        taken. ``None`` takes equal names only.

    Returns
    -------
    wanted name -> present name, for the names that the other file has.

    Raises
    ------
    UserError
        When the two files spell their names differently and no map helps.
    """
    if not wanted or not present:
        return {}
    suggested = suggest_mapping(wanted, present)
    mapping = suggested if chrom_map == "auto" else _apply(chrom_map or {}, wanted, present)
    respelled = {name: to for name, to in suggested.items() if name not in mapping}
    if not mapping or (chrom_map is None and len(respelled) > 1):
        raise UserError(_mismatch(wanted, present, mapping, respelled, what))
    if chrom_map is None and respelled:
        (name, to), *_ = respelled.items()
        warnings.warn(
            f"{what} has no chromosome {name!r}; if its {to!r} is the same, use --chrom-map auto.",
            Seq2ExprWarning,
            stacklevel=2,
        )
    return mapping


def read_chrom_map(path: str | os.PathLike) -> dict[str, str]:
    """Read a table of two tab-separated columns, a name and its other spelling, without header.

    Blank lines and lines that start with ``#`` are skipped.

    Raises
    ------
    UserError
        When the file cannot be read, has no rows, a row has not two columns or a name repeats.
    """
    mapping: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"Cannot read the chromosome map {path}: {reason}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells) or cells[0] in mapping:
            raise UserError(
                f"{path}, line {number}: {line!r} is no new pair of names. "
                "Write one name and its other spelling per line, separated by a tab."
            )
        mapping[cells[0]] = cells[1]
    if not mapping:
        raise UserError(f"The chromosome map {path} is empty. Write two names per line.")
    return mapping


def _match(
    wanted: Collection[str],
    present: Collection[str],
    mapping: dict[str, str],
    spell_wanted: Callable[[str], str],
    spell_present: Callable[[str], str],
) -> None:
    """Add to ``mapping`` the names that one free present name fits once both are respelled."""
    taken = set(mapping.values())
    spelled: dict[str, list[str]] = {}
    for name in dict.fromkeys(present):
        if name not in taken:
            spelled.setdefault(spell_present(name), []).append(name)
    for name in wanted:
        fits = spelled.get(spell_wanted(name), [])
        if name not in mapping and len(fits) == 1:
            mapping[name] = fits.pop()


def _apply(
    chrom_map: Mapping[str, str], wanted: Collection[str], present: Collection[str]
) -> dict[str, str]:
    known = set(present)
    backwards = {to: name for name, to in chrom_map.items()}
    candidates = {name: (chrom_map.get(name), backwards.get(name), name) for name in wanted}
    found = {
        name: next((other for other in others if other in known), None)
        for name, others in candidates.items()
    }
    return {name: other for name, other in found.items() if other is not None}


def _mismatch(
    wanted: Collection[str],
    present: Collection[str],
    mapping: Mapping[str, str],
    respelled: Mapping[str, str],
    what: str,
) -> str:
    auto = ""
    if respelled:
        examples = ", ".join(f"{name} = {to}" for name, to in list(respelled.items())[:2])
        auto = f"--chrom-map auto ({examples}) or "
    return (
        f"{what} names its chromosomes {_examples(present)} where {_examples(wanted)} are needed: "
        f"{len(mapping)} of {len(wanted)} match. Use {auto}--chrom-map FILE, a TSV with the two "
        "spellings of each chromosome."
    )


def _examples(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _plain(name: str) -> str:
    key = name.casefold().removeprefix("chr")
    if key in _MITOCHONDRIAL:
        return "mt"
    return str(int(key)) if _is_number(key) else key


def _arabic(name: str) -> str:
    """Return the plain name with a Roman numeral up to XXXIX turned into an Arabic one."""
    key = _plain(name)
    match = _ROMAN.fullmatch(key)
    if not key or match is None:
        return key
    tens, ones = match.groups()
    small = {"ix": 9, "iv": 4}.get(ones, 5 * ones.count("v") + ones.count("i"))
    return str(10 * len(tens) + small)


def _counts_roman(names: Collection[str]) -> bool:
    """Tell whether names are Roman numerals: one of several letters, and no Arabic number."""
    keys = [_plain(name) for name in names]
    numerals = [key for key in keys if len(key) > 1 and _ROMAN.fullmatch(key)]
    return bool(numerals) and not any(map(_is_number, keys))


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdigit()
