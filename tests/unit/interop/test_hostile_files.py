"""Whatever is done to a file, there is one clear error or a model; nothing runs, and memory stays small."""

import json
import pickle
import random
import resource
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import save
from safetensors.torch import save_file

from ryzen_llm.data import SpecialTokens, Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained, render_chat
from ryzen_llm.interop.native_directory import native_config, native_weights

MUTATIONS = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# What loading a sound file of these sizes needs, several times over; a header that lies asks for gigabytes.
MOST_MEMORY = 32 * 2**20


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory and a GGUF file that load."""
    root = tmp_path_factory.mktemp("sound")
    save("llama", root / "hf")
    write_gguf(root / "m.gguf", "llama", "llama")
    load_pretrained(root / "hf")
    load_pretrained(root / "m.gguf")
    return root


def attempt(path: Path) -> str | None:
    """The refusal, or None where it loads, which a change of a weight's bytes leaves possible."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal = None
    tracemalloc.start()
    try:
        load_pretrained(path)
    except InputError as error:
        refusal = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident  # torch's own too
        assert grown * (1 if sys.platform == "darwin" else 1024) < 8 * MOST_MEMORY
    assert refusal is None or ("\n" not in refusal and len(refusal) < 2000)
    return refusal


def damaged(content: bytes, seed: int, header: int) -> bytes:
    """Cut off, overwritten with chosen or random bytes, or with a stretch moved; mostly in the header."""
    chooser = random.Random(seed)
    data = bytearray(content)
    for _ in range(chooser.choice([1, 1, 1, 2, 5])):
        kind = chooser.choice(["cut", "bytes", "number", "insert", "delete"])
        at = chooser.randrange(header if chooser.random() < 0.9 else len(data))
        at = min(at, len(data) - 1)
        if kind == "cut":
            del data[chooser.randrange(len(data)) :]
        elif kind == "bytes":
            data[at] = chooser.randrange(256)
        elif kind == "number":
            number = chooser.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1])
            data[at : at + 8] = number.to_bytes(8, "little")
        elif kind == "insert":
            data[at:at] = bytes(chooser.randrange(256) for _ in range(chooser.choice([1, 8, 100])))
        else:
            del data[at : at + chooser.choice([1, 8, 100])]
        if not data:
            break
    return bytes(data)


@MUTATIONS
@given(seed=st.integers(0, 2**32))
def test_a_damaged_gguf_file(sound: Path, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    content = (sound / "m.gguf").read_bytes()
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged(content, seed, header=9000))
    attempt(path)


@MUTATIONS
@given(
    seed=st.integers(0, 2**32), file=st.sampled_from(["model.safetensors", "tokenizer.json", "config.json"])
)
def test_a_damaged_directory(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, file: str
) -> None:
    directory = tmp_path_factory.getbasetemp() / "damaged"
    shutil.copytree(sound / "hf", directory, dirs_exist_ok=True)
    content = (sound / "hf" / file).read_bytes()
    (directory / file).write_bytes(damaged(content, seed, header=min(len(content), 3000)))
    attempt(directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@MUTATIONS
@given(data=st.data())
def test_config_json_with_other_values(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp() / "other_values"
    shutil.copytree(sound / "hf", directory, dirs_exist_ok=True)
    values = json.loads((sound / "hf" / "config.json").read_text())
    key = data.draw(st.sampled_from([*values, "rope_scaling", "layer_types", "eos_token_id", "new_option"]))
    values[key] = data.draw(JSON | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 1e308, "a" * 10000]))
    (directory / "config.json").write_text(json.dumps(values))
    attempt(directory)


@settings(MUTATIONS, max_examples=100)
@given(data=st.data())
def test_a_compressed_directory_with_other_values(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The form of `export_pretrained(..., densify=False)`, with fields of our own in config.json."""
    directory = tmp_path_factory.getbasetemp() / "compressed"
    shutil.copytree(sound / "hf", directory, dirs_exist_ok=True)
    model, _ = load_pretrained(sound / "hf")
    save_file(dict(native_weights(model, model.embedding, torch.float32)), directory / "model.safetensors")
    values = native_config(model.config)
    (directory / "config.json").write_text(json.dumps(values))
    assert attempt(directory) is None
    key = data.draw(st.sampled_from([*values["model"], "new_option"]))
    values["model"][key] = data.draw(JSON | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 1e308]))
    (directory / "config.json").write_text(json.dumps(values))
    attempt(directory)


def lie_about_safetensors(path: Path) -> None:
    """A header that claims a tensor of a terabyte, with offsets that say so too."""
    content = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["model.norm.weight"] = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    new = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])


def long_header(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + content[8:])


def cut_off(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def deep_json(path: Path) -> None:
    (path / "config.json").write_text("[" * 100_000)


def absurd_number(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}")


@pytest.mark.parametrize("harm", [lie_about_safetensors, long_header, cut_off, deep_json, absurd_number])
def test_files_that_lie_are_refused(harm: Callable[[Path], None], sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "hf", tmp_path / "hf")
    harm(tmp_path / "hf")
    assert attempt(tmp_path / "hf") is not None


@pytest.mark.parametrize("position", [8, 16], ids=["tensors", "keys"])
@pytest.mark.parametrize("count", [2**16, 2**32, 2**63, 2**64 - 1])
def test_absurd_gguf_counts_are_refused_at_once(
    position: int, count: int, sound: Path, tmp_path: Path
) -> None:
    content = bytearray((sound / "m.gguf").read_bytes())
    content[position : position + 8] = count.to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(content)
    assert "truncated" in (attempt(tmp_path / "m.gguf") or "")


def test_a_gguf_file_that_may_not_be_read_is_one_error(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:  # chmod does not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("numpy.memmap", refuse)
    with pytest.raises(InputError, match=r"m.gguf: cannot be read \(Permission denied\)"):
        load_pretrained(sound / "m.gguf")


def test_gguf_tensors_that_share_bytes_are_refused(sound: Path, tmp_path: Path) -> None:
    """Otherwise a small file could hold a large model, all of it the same bytes."""
    content = bytearray((sound / "m.gguf").read_bytes())
    at = content.index(b"output_norm.weight") + len("output_norm.weight")
    offset = at + 4 + 8 + 4  # after the number of dimensions, the dimension and the type
    assert int.from_bytes(content[offset : offset + 8], "little") > 0
    content[offset : offset + 8] = bytes(8)
    (tmp_path / "m.gguf").write_bytes(content)
    assert "is misplaced" in (attempt(tmp_path / "m.gguf") or "")


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "it ran"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "m.gguf", "m.ckpt"])
def test_a_pickle_under_any_name_is_not_run(name: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "hf", tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    single = name in ("m.gguf", "m.ckpt")
    assert attempt(tmp_path / "hf" / name if single else tmp_path / "hf") is not None
    torch.save({"model": Runs(tmp_path / "ran")}, tmp_path / "hf" / name)
    assert attempt(tmp_path / "hf" / name if single else tmp_path / "hf") is not None
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def tokenizer(sound: Path) -> Tokenizer:
    return load_pretrained(sound / "hf")[1]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{% set _ = messages.append(1) %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content.x }}",
        "{{ cycler().next() }}",
        "{{ 1|xmlattr }}",
        "{% for a in [1] %}" * 21 + "{% endfor %}" * 21,
        "{{ 'a'.ljust(100000000) }}",
        "{{ ('a'|attr('rjust'))(100000000) }}",
        "{{ 'a'.encode().zfill(100000000)|length }}",
        "{{ '\t'.expandtabs(tabsize=100000000) }}",
        "{{ (1).to_bytes(100000000, 'big')|length }}",
        "{{ lipsum(100000) }}",
        "{{ '%0100000000d' % 1 }}",
        "{{ '%*d' % (100000000, 1) }}",
        "{{ ('%0100000000d'.encode() % 1)|length }}",
        "{{ '%-*d'|format(100000000, 1) }}",
        "{{ '{:0100000000d}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 100000000) }}",
        "{{ '{a:>{w}}'.format_map({'a': 1, 'w': 100000000}) }}",
        "{{ 'a'|indent(100000000, first=true) }}",
        "{{ ['a']|map('center', 100000000)|first }}",
        "{% filter center(width=100000000) %}a{% endfilter %}",
        "{{ [1]|batch(100000000, 0)|first|length }}",
        "{{ [1]|slice(1000000)|list|length }}",
        "{{ 1|round(1000000, 'ceil') }}",
        "{{ [1]|tojson(indent=100000000) }}",
    ],
)
def test_a_hostile_template_is_one_error(template: str, tokenizer: Tokenizer) -> None:
    hostile = Tokenizer(tokenizer._backend, SpecialTokens(chat_template=template))
    with pytest.raises(InputError, match="chat template failed"):
        render_chat(hostile, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ range(2 ** 3)|length }} {{ 2 ** -1 }} {{ 3 * 2.5 }} {{ 20000 % 7 }}", "8 0.5 7.5 1"),
        ("{{ '**%s** %5.1f 100%%' % ('x', 20000) }} {{ '%d'|format(123456) }}", "**x** 20000.0 100% 123456"),
        ("{{ '{} {:>3} {a}'.format(123456, 2, a='x') }}", "123456   2 x"),
        ("{{ 'x'.center(3) }}{{ 'a\nb'|indent(2) }}{{ 20000.26|round(1) }}", " x a\n  b20000.3"),
        ("{{ n|default(32768) }}{{ [1, 2, 3]|batch(2)|list }}", "32768[[1, 2], [3]]"),
    ],
)
def test_numbers_and_formats_of_usual_size_work(template: str, text: str, tokenizer: Tokenizer) -> None:
    """What is refused in the test above is their size."""
    ours = Tokenizer(tokenizer._backend, SpecialTokens(chat_template=template))
    assert render_chat(ours, [{"role": "user", "content": "hi"}]) == text


def test_a_template_that_needs_more_memory_than_there_is_is_one_error(tokenizer: Tokenizer) -> None:
    """Such as one that doubles a text again and again, which the sandbox lets it."""

    class Large:
        def __str__(self) -> str:
            raise MemoryError

    ours = Tokenizer(tokenizer._backend, SpecialTokens(chat_template="{{ messages[0].content }}"))
    with pytest.raises(InputError, match="chat template failed: MemoryError"):
        render_chat(ours, [{"role": "user", "content": Large()}])  # type: ignore[dict-item]


def test_the_templates_of_real_models_render_as_in_transformers(tokenizer: Tokenizer) -> None:
    import transformers

    template = (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}\n  {{- messages[0].content | trim }}\n"
        "{%- endif %}{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
        "{{ raise_exception('role') }}{% endif %}[{{ loop.index0 * 2 }}{{ m.role }}]{{ m.content | tojson }}"
        "{% if loop.last %}{% break %}{% endif %}\n    {% endfor %}"
        "{{ {'z': 'é', 'a': 1} | tojson(ensure_ascii=true, indent=2, sort_keys=true) }}"
        "{{ {'z': 'é', 'a': 1} | tojson(separators=(',', ':')) }}"
        "{%- set said = 'no' -%}\n{%- for m in messages -%}\n  {%- generation -%}\n"
        "  {%- set said = 'yes' -%}\n  {{ m.content ~ loop.index }}\n  {%- endgeneration -%}\n"
        "{%- endfor -%}{{ said }}"
        "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{{ eos_token }}"
    )
    messages = [{"role": "system", "content": " be <brief> 'é' "}, {"role": "user", "content": "hi\n"}]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    expected = theirs.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    ours = Tokenizer(tokenizer._backend, SpecialTokens("<|im_start|>", "<|im_end|>", (), template))
    assert render_chat(ours, messages) == expected


def test_without_a_template_there_is_no_conversation(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="has no chat template"):
        render_chat(Tokenizer(tokenizer._backend), [])
