import unicodedata

import pytest

from castbench.text.normalise import KEPT, normalise_matscibert, plain


@pytest.mark.parametrize("digit", "0123456789")
def test_digits_in_sub_and_superscript_are_kept(digit: str) -> None:
    subscript = chr(0x2080 + int(digit))
    superscript = {"1": "¹", "2": "²", "3": "³"}.get(digit, chr(0x2070 + int(digit)))
    assert normalise_matscibert(f"X{subscript}O") == f"X{digit}O"
    assert normalise_matscibert(f"Ti{superscript}⁺") == f"Ti{digit}+"
    assert normalise_matscibert(f"O{superscript}⁻") == f"O{digit}-"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Al₁₂O₁₉", "Al12O19"),
        ("P1̅", "P-1"),
        ("P¯1", "P-1"),
        ("P1", "P1"),
        ("Fm3̅m", "Fm-3m"),
        ("P2₁/c", "P2_1/c"),
        ("Fe²\u1427⁶⁷⁺", "Fe2.67+"),
        ("Na–Cl — 2.5 − 1", "Na-Cl - 2.5 - 1"),
        ("2.82 Å", "2.82 A"),
        ("2.82 \u212b", "2.82 A"),
        ("A\u030a", "A"),
        ("tilt angles are 13°", "tilt angles are 13°"),
        ("β-MnO2 is ∼3 μm", "β-MnO2 is ~3 μm"),
        ("Schrödinger’s “ﬁt”", 'Schrodinger\'s "fit"'),
        ("½", "1/2"),
        ("a\tb\u00a0c", "a b c"),
        ("zero\u200bwidth\u00ad", "zerowidth"),
        ("铁 is iron", "  is iron"),
        ("one\ntwo", "one\ntwo"),
    ],
)
def test_signs(text: str, expected: str) -> None:
    assert normalise_matscibert(plain(text)) == expected


def test_ascii_is_untouched_and_the_result_is_stable() -> None:
    ascii_text = "".join(map(chr, range(32, 127)))
    assert normalise_matscibert(ascii_text) == ascii_text
    everything = "".join(chr(i) for i in range(32, 0x3000) if unicodedata.category(chr(i)) != "Cs")
    once = normalise_matscibert(everything)
    assert normalise_matscibert(once) == once
    assert all(c in KEPT or c <= "~" or "Α" <= c <= "ω" or c == "\n" for c in once)


def test_descriptions_keep_all_but_the_angstrom_sign(shared_data) -> None:
    import json

    import zstandard

    with zstandard.open(shared_data / "elastic4.jsonl.zst", "rt", encoding="utf-8") as rows:
        for row in rows:
            text = json.loads(row)["description"] or ""
            assert normalise_matscibert(text) == text.replace("Å", "A").strip("\n")
