"""Byte-level BPE: text to token ids and back, through the `tokenizers` library."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ryzen_llm.data.atomic_write import write_atomically
from ryzen_llm.errors import InputError

END_OF_TEXT = "<|endoftext|>"
# What other projects call it, most specific first.
_END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<|im_end|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|end▁of▁sentence|>",
)
_MIN_VOCAB_SIZE = 257  # every byte, and end-of-text


class Tokenizer:
    """Text to token ids and back.

    A tokenizer trained here gives `decode(encode(text)) == text` for every text. Text that spells a special
    token is encoded as the ordinary characters that it is: no document can end itself.

    Attributes:
        vocab_size: one more than the largest token id.
        end_of_text_id: the id that separates documents and ends a generation.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        end_of_text = next((vocabulary[name] for name in _END_OF_TEXT_NAMES if name in vocabulary), None)
        if end_of_text is None:
            raise InputError(
                f"tokenizer: no end-of-text token; expected one of {', '.join(_END_OF_TEXT_NAMES)}"
            )
        self._backend = backend
        self.end_of_text_id: int = end_of_text
        self.vocab_size: int = max(vocabulary.values()) + 1

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train byte-level BPE (Sennrich et al. 2016; GPT-2's pre-tokenisation) on documents.

        The same documents give the same tokenizer on every machine.

        Raises:
            InputError: `vocab_size` is below 257, or more than the documents have pairs to merge for.
        """
        if vocab_size < _MIN_VOCAB_SIZE:
            raise InputError(
                f"vocab_size: {vocab_size} is too small; {_MIN_VOCAB_SIZE} is the least (bytes, end-of-text)"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(documents, trainer)
        reached = backend.get_vocab_size()
        if reached < vocab_size:
            raise InputError(
                f"vocab_size: {vocab_size} is more than the text supports, which gives {reached} tokens. "
                f"Set vocab_size to {reached} or less, or use more text"
            )
        return cls(backend)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Load what `to_json` returned, or the content of another project's tokenizer.json.

        Raises:
            InputError: not such a file, or without an end-of-text token.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(
                f"tokenizer: not a tokenizer.json of the tokenizers library ({error})"
            ) from error
        return cls(backend)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Load a tokenizer.json.

        Raises:
            InputError: no such file, or not a usable tokenizer.
        """
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"tokenizer: {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"tokenizer: {path} is not text; expected a tokenizer.json") from error
        try:
            return cls.from_json(text)
        except InputError as error:
            raise InputError(f"{error} (in {path})") from error

    def to_json(self) -> str:
        """Return the whole tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, atomically."""
        write_atomically(Path(path), self.to_json())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; no special token is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are spelled out, broken UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)


class StreamDecoder:
    """Decode ids as they are generated, giving out text only when its characters are complete.

    All that `push` returns, then `finish`, add up to `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The ids given out last: some decoders join words by looking at the token before.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Take more ids and return the text that they complete, which may be empty."""
        self._pending += ids
        text = self._text_of_pending()
        # A trailing replacement character may be the start of a character that the next token completes.
        return "" if text.endswith("\ufffd") else self._give_out(text)

    def finish(self) -> str:
        """Return what is left, with U+FFFD for a character that never was completed."""
        return self._give_out(self._text_of_pending())

    def _text_of_pending(self) -> str:
        known = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(known) :]

    def _give_out(self, text: str) -> str:
        if self._pending:
            self._context, self._pending = self._pending, []
        return text
