"""Byte-level BPE: text to token ids and back, through the `tokenizers` library."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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
OTHER_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What transformers gives a chat template by name, besides bos_token and eos_token."""
_SPECIAL_KEY = "ryzen_llm"
"""Where `Tokenizer.to_json` keeps what a tokenizer.json has no place for."""


@dataclass(frozen=True)
class SpecialTokens:
    """What an imported model's tokenizer comes with, besides how text is cut up.

    Attributes:
        bos: token that begins a text, as its chat template calls it.
        eos: token that ends a text, as its chat template calls it.
        stop_ids: ids that end a generation, besides end-of-text.
        chat_template: Jinja source that makes the text of a conversation.
        others: further tokens by the names that its chat template calls them, of `OTHER_TOKENS`.
    """

    bos: str | None = None
    eos: str | None = None
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    others: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> "SpecialTokens":
        """The inverse of `dataclasses.asdict`, through JSON. Raises InputError for anything else."""
        texts = ("bos", "eos", "chat_template")
        if isinstance(values, dict):
            values = {"others": {}} | values  # which older files do not have
        if (
            not isinstance(values, dict)
            or set(values) != {*texts, "stop_ids", "others"}
            or not all(values[name] is None or isinstance(values[name], str) for name in texts)
            or not isinstance(values["stop_ids"], list)
            or not all(type(token) is int for token in values["stop_ids"])
            or not isinstance(values["others"], dict)
            or not all(isinstance(token, str) for token in values["others"].values())
            or not set(values["others"]) <= set(OTHER_TOKENS)
        ):
            raise InputError(f"tokenizer: {_SPECIAL_KEY} is not what Tokenizer.to_json writes")
        return cls(**values | {"stop_ids": tuple(values["stop_ids"])})


class Tokenizer:
    """Text to token ids and back.

    A tokenizer trained here gives `decode(encode(text)) == text` for every text. Text that spells a special
    token is encoded as the ordinary characters that it is: no document can end itself.

    Attributes:
        vocab_size: one more than the largest token id.
        end_of_text_id: the id that separates documents.
        stop_ids: the ids that end a generation, end-of-text among them.
        special: what an imported model's tokenizer comes with.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens | None = None) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.special = special or SpecialTokens()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        names = [name for name in (*_END_OF_TEXT_NAMES, self.special.eos) if name in vocabulary]
        if not names:
            raise InputError(
                f"tokenizer: no end-of-text token; expected one of {', '.join(_END_OF_TEXT_NAMES)}"
            )
        self._backend = backend
        self.end_of_text_id: int = vocabulary[names[0]]
        self.stop_ids = tuple(sorted({self.end_of_text_id, *self.special.stop_ids}))
        self.vocab_size: int = max(vocabulary.values()) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickle forgets `encode_special_tokens`, and lets texts forge special tokens.
        return type(self).from_json, (self.to_json(),)

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
    def from_json(cls, text: str, special: SpecialTokens | None = None) -> "Tokenizer":
        """Load what `to_json` returned, or the content of another project's tokenizer.json.

        Raises:
            InputError: not such a file, or without an end-of-text token.
        """
        if f'"{_SPECIAL_KEY}"' in text:
            try:
                content = json.loads(text)
                special = SpecialTokens.from_dict(content.pop(_SPECIAL_KEY))
            except (ValueError, KeyError, AttributeError, RecursionError) as error:
                raise InputError(f"tokenizer: not a tokenizer.json ({error})") from error
            text = json.dumps(content, ensure_ascii=False)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(
                f"tokenizer: not a tokenizer.json of the tokenizers library ({error})"
            ) from error
        return cls(backend, special)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], special: SpecialTokens | None = None) -> "Tokenizer":
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
            return cls.from_json(text, special)
        except InputError as error:
            raise InputError(f"{error} (in {path})") from error

    def to_json(self) -> str:
        """Return the whole tokenizer: the text of a tokenizer.json, and `special` if there is any."""
        text = self.to_plain_json()
        if self.special == SpecialTokens():
            return text
        return json.dumps(json.loads(text) | {_SPECIAL_KEY: asdict(self.special)}, ensure_ascii=False)

    def to_plain_json(self) -> str:
        """Return the text of a tokenizer.json that other projects read; `special` is not in it."""
        return self._backend.to_str()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, atomically."""
        write_atomically(Path(path), self.to_json())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; no special token is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a text, with what the model expects before one (Gemma: <bos>)."""
        return self._backend.encode(text, add_special_tokens=True).ids

    def encode_rendered(self, text: str) -> list[int]:
        """Return the token ids of what a chat template made, in which special tokens are spelled out."""
        return self._reads_special.encode(text, add_special_tokens=False).ids

    @cached_property
    def _reads_special(self) -> tokenizers.Tokenizer:
        """Reads special tokens: one apart, because other threads encode with `_backend` meanwhile."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores, each as `encode_prompt` does."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=True)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are spelled out, broken UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)


class StreamDecoder:
    """Decode ids as they are generated, giving out text only when its characters are complete.

    All that `push` returns, then `finish`, add up to `tokenizer.decode` of all ids, but for one thing:
    SentencePiece's tokenizers decode a run of byte tokens that is no UTF-8 as U+FFFD for each of its bytes,
    also of the whole characters at its beginning, which are given out here before the run ends.

    Args:
        tokenizer: What the ids are of.
        after: The ids before the first; their text is not given out.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The ids given out last: some decoders join words by looking at the token before.
        self._context = list(after)
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
