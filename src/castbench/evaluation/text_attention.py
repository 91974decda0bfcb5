"""What [CLS] attends to in the text encoder: Figures 3 and 4 of CrysMMNet's supplement (Das et al. 2023).

The supplement shows "the 5th layer" of MatSciBERT with BertViz, which counts from 0: the fifth or the sixth
layer may be meant, and all layers are kept here.
"""

import logging
from pathlib import Path

import pyarrow.parquet as pq
import torch

from castbench.provenance import write_json
from castbench.text import read_encoder
from castbench.text.encoders import LayeredEncoder
from castbench.text.parts import PARTS
from castbench.text.reading import LABELS, Reader

log = logging.getLogger(__name__)


def extract_text_attention(
    descriptions: Path, tokens: Path, encoder: Path, output: Path, material: str | None = None
) -> None:
    """Write the attention of [CLS] to each word of a description, in every layer and head, as JSON.

    The encoder is as published: what CrysMMNet reads with its text encoder frozen.

    Args:
        descriptions: Parquet with material_id and text.
        tokens: a cache of tokens, which says how texts are cut.
        encoder: folder of the text encoder.
        output: {material_id, formula, text, encoder, words, parts (of `labels`), labels, tokens, tokens_full,
            weights: layers, heads, words}; a word has the sum over its tokens, a row the sum 1. Where there
            is no such material, or it has no text: {note}, which says so.
        material: an id of the descriptions; none where there is but one.
    """
    chosen = None if material is None else [("material_id", "=", material)]
    table = pq.read_table(descriptions, columns=["material_id", "text"], filters=chosen)
    if material is None:
        material = table["material_id"][0].as_py()
    text = table["text"][0].as_py() if len(table) else None
    if not text:
        note = f"attention.text: {material} has no description in this data set; take another crystal"
        log.warning(note)
        write_json(output, {"note": note})
        return
    reading = Reader.of(tokens, encoder).read(text)
    weights = cls_attention(LayeredEncoder.from_folder(encoder), torch.from_numpy(reading.ids))
    by_word = reading.by_word(weights.numpy()).round(6)
    formula = [word for word, part in zip(reading.words, reading.part_of_word, strict=True)
               if part == PARTS.index("formula")]  # fmt: skip
    write_json(
        output,
        {
            "material_id": material,
            "formula": " ".join(formula) or material,
            "text": reading.text,
            "encoder": {key: read_encoder(encoder)[key] for key in ("id", "revision")},
            "labels": LABELS,
            "words": reading.words,
            "parts": reading.part_of_word,
            "tokens": len(reading.ids),
            "tokens_full": reading.n_full,
            "weights": by_word.tolist(),
        },
    )
    log.info("%s: %d layers and %d heads over %d words", material, *by_word.shape)


@torch.inference_mode()
def cls_attention(encoder: LayeredEncoder, ids: torch.Tensor) -> torch.Tensor:
    """Attention (layers, heads, T) of the first token of a text, ids (T,)."""
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    _, maps = encoder.attend(encoder.embed(ids[None]), mask, 0, encoder.n_layers)
    return torch.stack([weights[0, :, 0] for weights in maps])
