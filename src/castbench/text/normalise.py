"""The form of text that MatSciBERT reads.

MatSciBERT (Gupta et al., npj Comput. Mater. 8, 102, 2022) was trained on text whose accents are stripped and
whose unusual signs are mapped to plain ones or to a space, line by line, before the tokenizer. Its own table
loses most digits in sub- and superscript and the overbar of a rotoinversion axis, so that P-1 reads as P1 and
Ti4+ as Ti+. Here these are kept: Unicode's compatibility forms do the work, and a short table the rest.
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
# A digit with an overbar, before or after it: how Unicode writes a rotoinversion axis.
OVERBAR = re.compile("([0-9])[\u0304\u0305]|\u00af([0-9])")


def normalise_matscibert(text: str) -> str:
    """Bring text to ASCII, Greek letters and a few signs; anything else becomes a space.

    Digits and charges in sub- and superscript become ordinary ones, an overbar a minus before its digit.
    """
    return "\n".join(_normalise_line(line) for line in text.splitlines())


def _normalise_line(line: str) -> str:
    # Decomposition would part the overbar from a digit that it stands on, so it goes first.
    line = OVERBAR.sub(lambda match: "-" + (match[1] or match[2]), line)
    signs = unicodedata.normalize("NFKD", line.translate(PLAIN)).translate(PLAIN)
    return "".join(sign if _is_kept(sign) else " " for sign in signs if not _is_dropped(sign))


def _is_dropped(sign: str) -> bool:
    """Accents leave no trace; nor do control and format characters other than white space."""
    category = unicodedata.category(sign)
    return category == "Mn" or (category in ("Cc", "Cf") and not sign.isspace()) or sign == "\ufffd"


def _is_kept(sign: str) -> bool:
    return " " < sign <= "~" or "Α" <= sign <= "ω" or sign in KEPT
