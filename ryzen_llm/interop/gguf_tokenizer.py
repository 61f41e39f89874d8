"""The tokenizer of a GGUF file, from its metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ryzen_llm.data import SpecialTokens, Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop.fields import Fields

_CONTROL, _USER_DEFINED = 3, 4
_OTHERS = {
    "unknown_token_id": "unk_token",
    "seperator_token_id": "sep_token",  # as GGUF spells it
    "padding_token_id": "pad_token",
    "mask_token_id": "mask_token",
}
"""Keys of the metadata, and what chat templates call the tokens."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPACE = "▁"


def _split(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _gpt2() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


# How text is cut up before byte-level BPE, by `tokenizer.ggml.pre`.
_CUTS: dict[str, Callable[[], list[pre_tokenizers.PreTokenizer]]] = {
    "gpt-2": _gpt2,
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), *_gpt2()],
    "qwen2": lambda: _split(_QWEN2),
    "llama-bpe": lambda: _split(_LLAMA3),
}


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes.

    Raises InputError where a key is missing or wrong, or the kind is not supported.
    """
    prefix = "tokenizer.ggml."
    fields = Fields(
        {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)},
        f"{where}: tokenizer",
    )
    kind = fields.text("model")
    tokens: list[str] = fields.items("tokens", str)
    types: list[int] = fields.items("token_type", int, [])
    pre = fields.text("pre", "default")
    if types and len(types) != len(tokens):
        raise InputError(f"{fields.where}: {len(types)} token types for {len(tokens)} tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"{fields.where}: a token is there twice")
    try:
        if kind == "gpt2":
            backend = _byte_level(fields, pre, vocabulary)
        elif kind == "llama":
            backend = _sentencepiece(fields, tokens, vocabulary)
        else:
            raise InputError(f"{fields.where}: model {kind[:60]!r} is not supported, expected gpt2 or llama")
        for special, number in ((True, _CONTROL), (False, _USER_DEFINED)):
            added = [token for token, type_ in zip(tokens, types, strict=False) if type_ == number]
            backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{fields.where}: cannot be built ({error})") from error
    bos, eos = (_token(fields, f"{name}_token_id", tokens) for name in ("bos", "eos"))
    if fields.flag("add_bos_token", kind == "llama" or pre == "llama-bpe") and bos is not None:
        if re.search(r"^\$|[ :]", bos):  # which mean something in a template
            raise InputError(f"{fields.where}: {bos[:60]!r} cannot be the token that begins a text")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    stops = {eos, *(_token(fields, f"{name}_token_id", tokens) for name in ("eot", "eom"))} - {None}
    template = Fields(metadata, where).text("tokenizer.chat_template", None)
    return Tokenizer(
        backend,
        SpecialTokens(
            bos=bos,
            eos=eos,
            stop_ids=tuple(sorted(vocabulary[token] for token in stops if token is not None)),
            chat_template=template,
            others=_others(metadata, tokens),
        ),
    )


def _token(fields: Fields, name: str, tokens: list[str]) -> str | None:
    index: int | None = fields.whole(name, None)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise InputError(f"{fields.where}: {name} is {index}, expected less than {len(tokens)}")
    return tokens[index]


def _others(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """Those that are there; some files have an id that no token has, which only a template would need."""
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for key, name in _OTHERS.items()}
    return {name: tokens[i] for name, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}


def _byte_level(fields: Fields, pre: str, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    if pre not in _CUTS:
        raise InputError(
            f"{fields.where}: pre-tokenizer {pre[:60]!r} is not supported, expected one of {', '.join(_CUTS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields.items("merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise InputError(f"{fields.where}: a merge is not two tokens")
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    cuts = _CUTS[pre]()
    backend.pre_tokenizer = cuts[0] if len(cuts) == 1 else pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, tokens: list[str], vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE, which merges the pair whose joined piece scores highest."""
    scores = fields.items("scores", float)
    if len(scores) != len(tokens):
        raise InputError(f"{fields.where}: {len(scores)} scores for {len(tokens)} tokens")
    unknown = _token(fields, "unknown_token_id", tokens)
    merges = []
    for piece, score in zip(tokens, scores, strict=True):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(score, pair) for pair in pairs]
    merges.sort(key=lambda merge: -merge[0])  # stable: equal scores in the order of the vocabulary
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for _, pair in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.flag("add_space_prefix", True):  # Llama 2; Gemma has none
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence(steps)
    return backend
