"""What the words of a description are about: its parts, as robocrystallographer writes them.

A description begins with one sentence on formula, mineral and symmetry; one on dimensionality may follow;
then sites are described one after another, each with its coordination, tilt angles and bond lengths
(robocrys.describe.describer). A text of another kind has the part "other" alone.
"""

import re
from typing import NamedTuple

PARTS = (
    "formula",
    "mineral",
    "symmetry",
    "dimensionality",
    "coordination",
    "bond lengths",
    "angles",
    "other",
)


class Span(NamedTuple):
    """Characters start to stop (excluded) of a text, about `part`, in its `sentence` (from 0)."""

    start: int
    stop: int
    part: str
    sentence: int


# A sentence ends at a full stop before a space and a capital; numbers and formulas have none inside.
END = re.compile(r"(?<=\.)\s+(?=[A-Z(])")
OPENING = re.compile(
    r"(?P<formula>\S+)(?P<mineral> is .+? structured and)?"
    r"(?P<symmetry> crystallizes in the .+ space group\.?)"
)
COMPONENTS = re.compile(r"The structure (is \S+-dimensional and )?consists of ")
# "In the ZrO2 framework," "In each Te ribbon," "In two of the MoS2 sheets,": where a component begins.
COMPONENT = re.compile(r"In (the|each|\S+ of the) \S+ (cluster|ribbon|sheet|framework)s?, ")
BONDS = re.compile(
    r"(The|Both|All|There (is|are)) (\S+ )*(bond (lengths?|distances)|(shorter|longer) \(\d)", re.IGNORECASE
)
ANGLES = re.compile(r"The corner-sharing octahedra")
SITES = re.compile(
    r"(In the \S+ \S+ site, )?\S+ is bonded |(In the \S+ \S+ site, )?There are \S+ inequivalent \S+ sites",
    re.IGNORECASE,
)


def find_parts(text: str) -> list[Span]:
    """The parts of a description, in order: all of it but the white space between sentences."""
    spans = []
    start = 0
    for number, stop in enumerate([*(match.start() for match in END.finditer(text)), len(text)]):
        start += len(text[start:stop]) - len(text[start:stop].lstrip())
        sentence = text[start:stop].rstrip()
        opening = OPENING.fullmatch(sentence) if number == 0 else None
        if opening:
            for part in ("formula", "mineral", "symmetry"):
                begin, end = opening.span(part)
                if begin >= 0:
                    spans.append(Span(start + begin, start + end, part, number))
        elif component := COMPONENT.match(sentence):
            end = start + component.end()
            spans.append(Span(start, end, "dimensionality", number))
            spans.append(Span(end, start + len(sentence), _kind(sentence[component.end() :]), number))
        elif sentence:
            spans.append(Span(start, start + len(sentence), _kind(sentence), number))
        start = stop
    return spans


def _kind(sentence: str) -> str:
    for part, form in (
        ("dimensionality", COMPONENTS),
        ("angles", ANGLES),
        ("coordination", SITES),
        ("bond lengths", BONDS),
    ):
        if form.match(sentence):
            return part
    return "other"
