"""BERT WordPiece: texts to token ids, cut and wrapped as the authors' loaders do (spec section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pipelines.errors import BadInput
from pipelines.files import lines, write_atomic

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHUNK = 8192  # texts per call: bounds the memory of the tokenizer's own result objects


class WordPiece:
    """Lower-cased BERT WordPiece over a vocabulary file, one token a line, the line number being the id."""

    def __init__(self, tokens: Sequence[str], where: object = "vocabulary") -> None:
        """`where` names the source in errors. Raises `BadInput` for repeated tokens and missing special ones."""
        vocabulary = {token: number for number, token in enumerate(tokens)}
        missing = [token for token in SPECIAL if token not in vocabulary]
        if missing:
            mend = "a BERT vocabulary has [PAD], [UNK], [CLS], [SEP] and [MASK]"
            raise BadInput(where, f"no special token {', '.join(missing)}", mend)
        if len(vocabulary) < len(tokens):
            raise BadInput(where, f"{len(tokens) - len(vocabulary)} tokens stand twice", "ids would be ambiguous")
        self.size = len(tokens)
        self.pad, self.unk, self.cls, self.sep, self.mask = (vocabulary[token] for token in SPECIAL)
        self._tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.decoder = decoders.WordPiece(cleanup=False)
        self._tokenizer.add_special_tokens(list(SPECIAL))  # "[MASK]" within a text is that token, as in the authors'

    @classmethod
    def load(cls, path: Path) -> WordPiece:
        """From a vocabulary file. Raises `BadInput` as `files.lines` and the constructor do."""
        return cls([token for _, token in lines(path)], path)

    def __len__(self) -> int:
        return self.size

    def encode_batch(self, texts: Sequence[str], max_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Token ids of all texts one after the other, int32 [T], and where each begins, int64 [texts + 1].

        Each text is [CLS], its first `max_tokens - 2` word pieces, [SEP]: between 2 and `max_tokens` (>= 2) ids.
        """
        if max_tokens < 2:
            raise ValueError("[CLS] and [SEP] alone are two tokens")
        ids: list[int] = []
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            encodings = self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            for row, encoding in enumerate(encodings, start + 1):
                ids.append(self.cls)
                ids.extend(encoding.ids[: max_tokens - 2])
                ids.append(self.sep)
                offsets[row] = len(ids)
        return np.array(ids, dtype=np.int32), offsets

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The words of a row of ids, word pieces joined, [CLS], [SEP] and [PAD] left out. For people to read."""
        unseen = {self.cls, self.sep, self.pad}
        text: str = self._tokenizer.decode([int(i) for i in ids if int(i) not in unseen], skip_special_tokens=False)
        return text

    def save(self, folder: Path) -> None:
        """Write `vocab.txt`, and `tokenizer.json`, which the `tokenizers` library reads, [CLS] and [SEP] put around a text."""
        vocabulary = self._tokenizer.get_vocab()
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        write_atomic(folder / "vocab.txt", "".join(f"{token}\n" for token in tokens).encode())
        wrapping = Tokenizer.from_str(self._tokenizer.to_str())
        wrapping.post_processor = processors.BertProcessing((SEP, self.sep), (CLS, self.cls))
        write_atomic(folder / "tokenizer.json", wrapping.to_str(pretty=True).encode())
