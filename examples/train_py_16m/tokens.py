"""From documents to a tokenizer, token files and plain texts."""

import json
import lzma
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from corpus import END_OF_TEXT, Document, collect
from model import CONFIG
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

TEXTS = ("heldout.txt", "calibration.txt")
TOKENIZER = "tokenizer"

_CALIBRATION = frozenset(("stdlib", "numpy", "sympy", "pandas", "transformers", "pytest"))
_TOKENIZER_DOCUMENTS = 7000
_LONGEST_QUOTE = 40_000
_XZ = {
    "id": lzma.FILTER_LZMA2,
    "preset": 6,
    "dict_size": 1 << 27,
    # Two bytes a token: literals are coded by their position modulo two.
    "lc": 0,
    "lp": 1,
    "pb": 1,
}


def prepare(site_packages: Iterable[Path], out: Path) -> None:
    """Write tokenizer, token files, texts and a list of sources to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    training, held_out = collect(site_packages, rng)
    for name, documents in (("training", training), ("held out", held_out)):
        size = sum(len(document.text) for document in documents)
        print(f"{name}: {size / 1e6:.1f} MB in {len(documents)} files")
    sizes: Counter[str] = Counter()
    for document in held_out + training:
        sizes[document.package] += len(document.text)
    (out / "sources.json").write_text(json.dumps(sizes.most_common(), indent=0))
    tokenizer = _train_tokenizer(training[:_TOKENIZER_DOCUMENTS])
    _save_tokenizer(tokenizer, out / TOKENIZER)
    rng.shuffle(held_out)
    _write_tokens(out / "heldout.u16.xz", tokenizer, held_out)
    _write_tokens(out / "train.u16.xz", tokenizer, training)
    _write_text(out / "heldout.txt", held_out, 1_900_000)
    quotable = [document for document in training if document.package in _CALIBRATION]
    _write_text(out / "calibration.txt", quotable, 950_000)


def load_tokens(path: Path, device: str) -> Tensor:
    """Read a token file, (num_tokens,), int16 (every id of this vocabulary fits)."""
    with lzma.open(path) as file:
        ids = np.frombuffer(file.read(), np.uint16)
    return torch.from_numpy(ids.astype(np.int16)).to(device)


def _train_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONFIG.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _write_tokens(path: Path, tokenizer: Tokenizer, documents: Sequence[Document]) -> None:
    """Write all token ids as uint16; every file starts with the end-of-text token."""
    ids: list[int] = []
    for begin in range(0, len(documents), 1000):
        texts = [document.text for document in documents[begin : begin + 1000]]
        for encoding in tokenizer.encode_batch(texts):
            ids += [CONFIG.eos_token_id, *encoding.ids]
    with lzma.open(path, "wb", format=lzma.FORMAT_XZ, filters=[_XZ]) as file:
        file.write(np.array(ids, np.uint16).tobytes())
    print(f"{path.name}: {len(ids)} tokens in {path.stat().st_size} bytes")


def _write_text(path: Path, documents: Iterable[Document], limit: int) -> None:
    """Write documents up to `limit` characters, and beside them a list of their files."""
    written, length, index = [], 0, []
    for document in documents:
        entry = END_OF_TEXT + document.text
        if length + len(entry) <= limit and len(document.text) < _LONGEST_QUOTE:
            written.append(entry)
            length += len(entry)
            index.append(f"{document.package}\t{document.path}\n")
    path.write_text("".join(written), encoding="utf-8")
    path.with_suffix(".files.tsv").write_text("".join(index), encoding="utf-8")
