"""Encoding loses nothing, no text forges a special token, training is deterministic, bad files refused."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from random_text import random_text
from tokenizers import models

from ryzen_llm.data.tokenizer import END_OF_TEXT, SpecialTokens, StreamDecoder, Tokenizer
from ryzen_llm.errors import InputError

DOCUMENTS = [random_text(i, 200) for i in range(40)]
TOKENIZER = Tokenizer.train(DOCUMENTS, 300)
any_text = st.text() | st.text(alphabet=" \n\r\tab<|endoftext|>é東🚀\u200d\ufffd\0")


@given(any_text)
def test_round_trip(text: str) -> None:
    """decode(encode(text)) is text, for every text there is."""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(any_text, max_size=5))
def test_batches_encode_like_single_texts(texts: list[str]) -> None:
    """The store is built with encode_batch, prompts are encoded with encode."""
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


@given(any_text, any_text)
def test_text_cannot_forge_end_of_text(before: str, after: str) -> None:
    """A document that spells <|endoftext|> does not end there."""
    text = before + END_OF_TEXT + after
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.end_of_text_id not in ids
    assert TOKENIZER.decode(ids) == text


def test_what_one_thread_renders_lets_no_other_forge_special_tokens() -> None:
    """A server encodes what users say while it renders other chats."""
    with ThreadPoolExecutor() as pool:
        rendering = [pool.submit(TOKENIZER.encode_rendered, END_OF_TEXT + "a" * 200_000) for _ in range(20)]
        while not all(done.done() for done in rendering):
            assert TOKENIZER.end_of_text_id not in TOKENIZER.encode(END_OF_TEXT)
    assert all(done.result()[0] == TOKENIZER.end_of_text_id for done in rendering)


@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy])
def test_a_copy_is_the_same_tokenizer(copied: Callable[[Tokenizer], Tokenizer]) -> None:
    """Processes are given one by pickle, and no text forges a special token there either."""
    special = SpecialTokens("<s>", END_OF_TEXT, (7,), "{{ messages }}", {"pad_token": "<pad>"})
    original = Tokenizer.from_json(TOKENIZER.to_json(), special)
    assert original.encode_rendered(END_OF_TEXT) == [original.end_of_text_id]
    again = copied(original)
    assert again.to_json() == original.to_json()
    assert again.special == special
    assert again.encode(END_OF_TEXT) == TOKENIZER.encode(END_OF_TEXT)
    assert again.encode_rendered(END_OF_TEXT) == [original.end_of_text_id]


def test_what_a_tokenizer_of_before_it_knew_other_tokens_has_kept_is_read() -> None:
    special = SpecialTokens("<s>", END_OF_TEXT, (7,), "{{ messages }}")
    content = json.loads(Tokenizer.from_json(TOKENIZER.to_json(), special).to_json())
    del content["ryzen_llm"]["others"]
    assert Tokenizer.from_json(json.dumps(content)).special == special


@pytest.mark.parametrize("others", [None, [], {"pad_token": 3}, {"messages": "none"}])
def test_other_tokens_that_are_none_are_refused(others: Any) -> None:
    content = json.loads(TOKENIZER.to_json()) | {"ryzen_llm": asdict(SpecialTokens()) | {"others": others}}
    with pytest.raises(InputError, match="is not what Tokenizer"):
        Tokenizer.from_json(json.dumps(content))


def test_a_reloaded_tokenizer_is_the_same(tmp_path: Path) -> None:
    """Neither saving nor loading changes an id, nor lets special tokens be forged."""
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = DOCUMENTS[0] + END_OF_TEXT + "東京"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.to_json() == TOKENIZER.to_json()
    assert (loaded.vocab_size, loaded.end_of_text_id) == (300, TOKENIZER.end_of_text_id)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_threads_that_save_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each has a temporary file of its own."""
    path = tmp_path / "tokenizer.json"
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: TOKENIZER.save(path), range(200)))
    assert Tokenizer.from_file(path).to_json() == TOKENIZER.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_merges_are_those_of_the_definition() -> None:
    """Brute force on a small corpus: each merge joins the most frequent pair of neighbours in its words."""
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    trained = Tokenizer.train([" ".join([word] * count) for word, count in words.items()], 262)
    merges = [tuple(pair) for pair in json.loads(trained.to_json())["model"]["merges"]]
    # GPT-2's pre-tokeniser gives the space to the word after it, as the character Ġ.
    parts = [list(word) for word in words] + [["Ġ", *word] for word in words]
    counts = [1] * len(words) + [count - 1 for count in words.values()]
    for merge in merges:
        pairs: dict[tuple[str, str], int] = {}
        for word, count in zip(parts, counts, strict=True):
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + count
        assert pairs[merge] == max(pairs.values())
        for word in parts:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == merge:
                    word[i : i + 2] = ["".join(merge)]
                i += 1
    assert len(merges) == 5


def test_training_is_deterministic_between_processes() -> None:
    """Two machines that train on the same text must agree on every id."""
    program = (
        "from random_text import random_text\n"
        "from ryzen_llm.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.train([random_text(i, 200) for i in range(40)], 300).to_json(), end='')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        env=environment,
    )
    assert result.stdout.decode() == TOKENIZER.to_json()


@given(any_text, st.lists(st.integers(0, 299), max_size=30), st.data())
def test_streaming_adds_up_to_decoding_the_whole(text: str, more: list[int], data: st.DataObject) -> None:
    """However the ids arrive, and even if they are no valid UTF-8, the text is that of decode."""
    ids = TOKENIZER.encode(text) + more
    decoder, streamed = StreamDecoder(TOKENIZER), ""
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        streamed += decoder.push(ids[:count])
        ids = ids[count:]
    streamed += decoder.finish()
    assert streamed == TOKENIZER.decode(TOKENIZER.encode(text) + more)


@given(any_text, any_text)
def test_streaming_after_other_ids_gives_out_the_rest_of_the_text(before: str, text: str) -> None:
    """The text of a prompt's ids is not given out again."""
    decoder = StreamDecoder(TOKENIZER, after=TOKENIZER.encode(before))
    pieces = [decoder.push([token]) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) + decoder.finish() == text


def test_streaming_gives_out_whole_characters_as_soon_as_they_are_complete() -> None:
    """A rocket is four bytes, here four tokens: nothing before the last of them, all of it then."""
    tokenizer = Tokenizer.train(["ab"], 257)
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push([i]) for i in tokenizer.encode("a🚀b")] == ["a", "", "", "", "🚀", "b"]
    assert decoder.finish() == ""


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        (["aaaa bbbb"], 5000, r"5000 is more than the text supports, which gives 26\d tokens"),
        ([], 258, "258 is more than the text supports, which gives 257 tokens"),
        (DOCUMENTS, 256, "256 is too small; 257 is the least"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(documents: list[str], vocab_size: int, message: str) -> None:
    """The error gives both figures."""
    with pytest.raises(InputError, match=message):
        Tokenizer.train(documents, vocab_size)


@pytest.mark.parametrize("name", ["</s>", "<|im_end|>", "<eos>", "<|end_of_text|>"])
def test_other_projects_end_of_text_is_found(name: str) -> None:
    """A tokenizer.json of another project brings its own name for it."""
    foreign = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    foreign.add_special_tokens([name])
    assert Tokenizer.from_json(foreign.to_str()).end_of_text_id == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a tokenizer.json"),
        (b'{"a": 1}', "not a tokenizer.json"),
        (b"\xff\xfe", "is not text"),
        (
            tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode(),
            "no end-of-text token",
        ),
        (None, "cannot be read"),
    ],
)
def test_an_unusable_tokenizer_file_is_one_clear_error(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    """The error names the file."""
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Tokenizer.from_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
