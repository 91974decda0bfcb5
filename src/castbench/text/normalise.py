"""One form of text for every encoder, and the form that MatSciBERT reads.

The Materials Project serves descriptions with signs in sub- and superscript and overbars, or with HTML tags;
robocrystallographer by default, and so castbench, writes SnO2, Ti4+, P-1 and P2_1/c. `plain` turns the first
into the second before any tokenizer, which would lose what it does not know.

MatSciBERT (Gupta et al., npj Comput. Mater. 8, 102, 2022) was trained on text whose accents are stripped and
whose unusual signs are mapped to plain ones or to a space, line by line, before the tokenizer. Its own table
loses most digits in sub- and superscript. Here these are kept: Unicode's compatibility forms do the work, and
a short table the rest.
"""

import re
import unicodedata

# Signs without a compatibility form that have a plain counterpart.
PLAIN = str.maketrans(
    {
        **dict.fromkeys("‐‑‒–—―−﹣－⁻₋", "-"),
        **dict.fromkeys("‘’‚‛′ʹʼ", "'"),
        **dict.fromkeys("“”„‟″", '"'),
        **dict.fromkeys("∼～˜", "~"),
        **dict.fromkeys("·⋅∙•∗", "*"),
        **dict.fromkeys("⁄∕÷", "/"),
        **dict.fromkeys("∣∥‖", "|"),
        "⟨": "<", "⟩": ">", "〈": "<", "〉": ">", "ˆ": "^", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae",
        "Æ": "AE", "œ": "oe", "Œ": "OE", "ß": "ss", "ı": "i", "đ": "d", "Δ": "Δ", "∆": "Δ", "µ": "μ",
    }
)  # fmt: skip
# What else is kept beside ASCII and Greek letters; the tokenizer's vocabulary has them all.
KEPT = frozenset("°±×≈≃≠≡≤≥→←↔↑↓∞√∂∇∑∏∫∈∝⊥¶§©®")
# The point is a syllabic sign, for want of one in superscript.
RAISED_OR_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉\u1427", "0123456789+-0123456789.")
# A subscript behind a digit is a screw axis, as in P2_1; behind a letter or bracket an amount, as in SnO2.
# robocrystallographer's HTML for P2_12_12_1 is P2<sub>12</sub><sub>12</sub><sub>1</sub>.
SCREW_AXIS = re.compile("(?<=[0-9])(?=[₀-₉])|(?:(?<=[0-9])|(?<=</sub>))<sub>")
TAG = re.compile("</?su[bp]>")
OVERLINED = re.compile('<span style="text-decoration: ?overline">([0-9])</span>')
# robocrystallographer puts the bar of a rotoinversion axis before its digit, emmet and pymatgen behind it.
OVERBAR = re.compile("([0-9])[\u0304\u0305]+|[\u0305\u00af]+([0-9])[\u0304\u0305]*")
NUMPY_INTEGER = re.compile(r"np\.int64\((-?[0-9]+)\)")  # in orientations written under numpy 2
# Prototypes that its raw text names in LaTeX, its Unicode and HTML not: all there are in version 0.2.13.
MINERALS = {"Frank-Kasper μ Phase": r"Frank-Kasper $\mu$ Phase", "Lazarevićite": r"Lazarevi\'{c}ite"}


def plain(text: str) -> str:
    """Bring a description in robocrystallographer's Unicode or HTML format to its raw format, sign by sign.

    Raw text stays as it is.
    """
    text = TAG.sub("", SCREW_AXIS.sub("_", text)).translate(RAISED_OR_LOWERED)
    text = OVERLINED.sub(r"-\1", text)
    text = OVERBAR.sub(lambda match: "-" + (match[1] or match[2]), text)
    for name, raw in MINERALS.items():
        text = text.replace(name, raw)
    return NUMPY_INTEGER.sub(r"\1", text)


def normalise_matscibert(text: str) -> str:
    """Bring plain text to ASCII, Greek letters and a few signs; anything else becomes a space."""
    return "\n".join(_normalise_line(line) for line in text.splitlines())


def _normalise_line(line: str) -> str:
    signs = unicodedata.normalize("NFKD", line.translate(PLAIN)).translate(PLAIN)
    return "".join(sign if _is_kept(sign) else " " for sign in signs if not _is_dropped(sign))


def _is_dropped(sign: str) -> bool:
    """Accents leave no trace; nor do control and format characters other than white space."""
    category = unicodedata.category(sign)
    return category == "Mn" or (category in ("Cc", "Cf") and not sign.isspace()) or sign == "\ufffd"


def _is_kept(sign: str) -> bool:
    return " " < sign <= "~" or "Α" <= sign <= "ω" or sign in KEPT
