"""WordNet's nouns as a hierarchy: the hypernym pointers (@) of data.noun, whose format is in wndb(5WN). Instance pointers (@i) are no
subsumptions.

Of WordNet 3.0 (Debian's wordnet-base, /usr/share/wordnet) that is 74,401 entities, 75,850 direct and 587,658 indirect edges, the numbers
of HiT (arXiv 2401.11374).
"""

from __future__ import annotations

import os
from pathlib import Path

from .hierarchy import Hierarchy

DEFAULT = Path("/usr/share/wordnet")


def read_wordnet(folder: str | os.PathLike = DEFAULT) -> Hierarchy:
    """The synsets that have a hypernym or a hyponym, each named by its first word. ValueError: no data.noun, or a line of it that is
    none."""
    file = Path(folder) / "data.noun"
    if not file.is_file():
        raise ValueError(
            f"wordnet: {file} is not there; on Debian or Ubuntu: apt-get install wordnet-base, elsewhere WordNet 3.0's dict folder"
        )
    words: dict[str, str] = {}
    edges: dict[str, list[str]] = {}
    with file.open(encoding="ascii") as lines:
        for number, line in enumerate(lines, 1):
            if line.startswith("  "):  # the licence
                continue
            try:
                synset, word, above = _synset(line)
            except (ValueError, IndexError) as error:
                raise ValueError(f"wordnet: {file} line {number} is no synset ({error}): {line[:60]!r}") from error
            words[synset], edges[synset] = word, above
    kept = [synset for synset in words if edges[synset]]
    linked = {*kept, *(parent for synset in kept for parent in edges[synset])}
    missing = linked.difference(words)
    if missing:
        raise ValueError(f"wordnet: {file} refers to synset {min(missing)}, which it does not hold")
    chosen = [synset for synset in words if synset in linked]
    index = {synset: i for i, synset in enumerate(chosen)}
    return Hierarchy([words[synset] for synset in chosen], [[index[parent] for parent in edges[synset]] for synset in chosen])


def _synset(line: str) -> tuple[str, str, list[str]]:
    """offset, first word, offsets of the hypernyms. offset filenum type w_cnt(hex) (word lex_id)... p_cnt (symbol offset pos
    source/target)... | gloss"""
    cells = line.partition("|")[0].split()
    pointers = 4 + 2 * int(cells[3], 16)
    above = []
    for start in range(pointers + 1, pointers + 1 + 4 * int(cells[pointers]), 4):
        symbol, target, part, _ = cells[start : start + 4]
        if symbol == "@" and part == "n":
            above.append(target)
    return cells[0], cells[4].replace("_", " "), above
