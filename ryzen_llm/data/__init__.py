"""Text in, batches of token ids out: corpora, tokenizer, token store and the LightningDataModule."""

from ryzen_llm.data.corpus import Corpus, open_corpus
from ryzen_llm.data.datamodule import TextDataModule
from ryzen_llm.data.token_store import TokenStore, default_cache_dir
from ryzen_llm.data.tokenizer import OTHER_TOKENS, SpecialTokens, StreamDecoder, Tokenizer

__all__ = [
    "OTHER_TOKENS",
    "Corpus",
    "SpecialTokens",
    "StreamDecoder",
    "TextDataModule",
    "TokenStore",
    "Tokenizer",
    "default_cache_dir",
    "open_corpus",
]
