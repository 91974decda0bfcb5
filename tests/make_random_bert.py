"""Write a BERT of MatSciBERT's exact shape with random weights: python tests/make_random_bert.py FOLDER.

For runs of the paper's preset where MatSciBERT cannot be had. The vocabulary is of its size, with its special
tokens in their places; the words are made here, unless a file of the published ones is given.
"""

import argparse
from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase, digits, punctuation

SIZE = 31_090  # of SciBERT's and MatSciBERT's vocabulary
SPECIAL = {"[PAD]": 0, "[UNK]": 101, "[CLS]": 102, "[SEP]": 103, "[MASK]": 104}
WORDS = """
    crystallizes in the space group cubic hexagonal trigonal tetragonal orthorhombic monoclinic triclinic and
    structured structure is bonded to form a mixture of corner edge face sharing share octahedra tetrahedra
    one two three four five six eight twelve equivalent atom atoms all both there are bond length lengths
    distances spread ranging from shorter longer geometry distorted body centered linear planar pyramidal
    coordinate dimensional consists sheets oriented direction inequivalent sites site first second not tilted
""".split()  # noqa: SIM905


def invented_words() -> Iterator[str]:
    """Signs, words of descriptions, and letters in twos and threes, at the start of a word and inside."""
    signs = [*ascii_lowercase, *digits, *punctuation, "°"]
    yield from signs
    yield from (f"##{sign}" for sign in signs)
    yield from WORDS
    for length in (2, 3):
        for letters in product(ascii_lowercase, repeat=length):
            yield "".join(letters)
            yield "##" + "".join(letters)


def invented_vocabulary() -> list[str]:
    """As many different entries as MatSciBERT has, the special tokens where it has them."""
    places = {place: token for token, place in SPECIAL.items()}
    head = [places.get(place, f"[unused{place}]") for place in range(max(places) + 1)]
    words = dict.fromkeys(invented_words())
    return list(islice(chain(head, words), SIZE))


def make_random_bert(folder: Path, vocabulary: list[str], seed: int = 0) -> None:
    """Write configuration, tokenizer and random weights as a local Hugging Face folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512)
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    if len(vocabulary) != SIZE or found != SPECIAL:
        raise SystemExit(f"not MatSciBERT's vocabulary: {len(vocabulary)} entries, {found}")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=SIZE, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=512,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", type=Path, help="file of the published word pieces, one a line")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    words = given.vocabulary and given.vocabulary.read_text(encoding="utf-8").splitlines()
    make_random_bert(given.folder, words or invented_vocabulary(), given.seed)


if __name__ == "__main__":
    main()
