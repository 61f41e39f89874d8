"""Generate text with a model: continue prompts, or hold a conversation."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ryzen_llm.cache import CACHES
from ryzen_llm.data import StreamDecoder, Tokenizer
from ryzen_llm.decoding import DRAFTER_NAMES, WEIGHTS, Generation, Generator
from ryzen_llm.decoding.sampling import SEEDS
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_drafters, load_pretrained, render_chat
from ryzen_llm.pipeline import exit_with

MOST_TOGETHER = 32
"""Prompts that are decoded together."""


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 bad input, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="a checkpoint, the output directory of train.py, a Hugging Face directory or a GGUF file",
    )
    parser.add_argument("--prompt", action="append", help="a text to continue; may be given several times")
    parser.add_argument("--prompt-file", help="a file with a prompt a line; - reads them from stdin")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="take prompts for what a user says, in the model's chat template; without any, converse here",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens that hold this probability")
    parser.add_argument("--seed", type=int, help="makes the text repeatable")
    parser.add_argument("--cache", default="dense", metavar="NAME", help=f"one of {', '.join(CACHES)}")
    parser.add_argument(
        "--weights", default="bf16", choices=WEIGHTS, help="int8 and int4 decode faster (default: bf16)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the decoding step: a minute once, then faster"
    )
    parser.add_argument(
        "--drafter",
        action="append",
        metavar="NAME[:PATH]",
        help=f"decode speculatively, the same text sooner: {DRAFTER_NAMES}; "
        "may be given several times, to choose from at each step",
    )
    parser.add_argument(
        "--json", action="store_true", help="print an object, or a list of them for several prompts"
    )
    options = parser.parse_args(arguments)
    try:
        prompts = _prompts(options)
        if options.seed is not None and options.seed not in SEEDS:
            raise InputError(f"--seed is {options.seed}, expected a number of 64 bits")
        model, tokenizer = load_pretrained(options.model)
        generator = Generator(
            model,
            cache=options.cache,
            drafter=load_drafters(
                options.drafter or (), model, weights=options.weights, compile=options.compile
            ),
            weights=options.weights,
            compile=options.compile,
        )
        if not prompts:
            converse(generator, tokenizer, options)
        elif options.json or len(prompts) > 1:
            answers = answer_all(generator, tokenizer, prompts, options)
            if options.json:
                print(json.dumps(answers if len(answers) > 1 else answers[0]))
            else:
                print("\n\n".join(answer["prompt"] + answer["text"] for answer in answers))
        else:
            ids = _encode(tokenizer, prompts[0], options.chat)
            if not options.chat:
                print(prompts[0], end="", flush=True)
            _stream(generator, tokenizer, ids, options)
    except InputError as error:
        return exit_with(error)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def answer_all(
    generator: Generator, tokenizer: Tokenizer, prompts: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A dictionary for each prompt, in their order.

    Greedy prompts are decoded together, without padding; what is drawn at random is drawn for each prompt by
    itself. So every prompt has the text that it would have alone. In a chat, the text is without the token
    that ends a turn.
    """
    encoded = [_encode(tokenizer, prompt, options.chat) for prompt in prompts]
    together = MOST_TOGETHER if options.temperature == 0 else 1
    answers = []
    for start in range(0, len(prompts), together):
        batch = slice(start, start + together)
        out = _generate(generator, tokenizer, encoded[batch], options)
        for prompt, ids, row in zip(prompts[batch], encoded[batch], out.new_ids.tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in tokenizer.stop_ids), None)
            new_ids = row[:end]
            decoder = _decoder(tokenizer, ids, options)
            text = decoder.push(new_ids[:-1] if options.chat and end else new_ids) + decoder.finish()
            answers.append(
                {
                    "prompt": prompt,
                    "text": text,
                    "ids": new_ids,
                    "tokens_per_second": out.tokens_per_second,
                    "accepted_per_step": out.accepted_per_step,
                    "time_to_first_token_s": out.time_to_first_token_s,
                    "stop_reason": "length" if end is None else "stop",
                }
            )
    return answers


def converse(generator: Generator, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Take turns with the user until the end of input, the whole conversation before the model each time."""
    messages: list[dict[str, str]] = []
    _encode(tokenizer, "Hello", chat=True)  # fails where no turn can work
    while True:
        try:
            said = input("> ").strip()
            said.encode()
        except EOFError:
            print()
            return
        except UnicodeError as error:
            raise InputError("what was said is not UTF-8 text") from error
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        try:
            ids = tokenizer.encode_rendered(render_chat(tokenizer, messages))
            messages.append({"role": "assistant", "content": _stream(generator, tokenizer, ids, options)})
        except InputError as error:  # too long, for one: the conversation goes on without it
            messages.pop()
            exit_with(error)


def _stream(generator: Generator, tokenizer: Tokenizer, ids: list[int], options: argparse.Namespace) -> str:
    """Print the text as it comes, without the token that ends a turn; returns it."""
    decoder = _decoder(tokenizer, ids, options)
    pieces: list[str] = []

    def show(piece: str) -> None:
        print(piece, end="", flush=True)
        pieces.append(piece)

    def push(new: list[int]) -> None:
        if not options.chat or new[0] not in tokenizer.stop_ids:
            show(decoder.push(new))

    _generate(generator, tokenizer, [ids], options, push)
    show(decoder.finish())
    print()
    return "".join(pieces)


def _decoder(tokenizer: Tokenizer, ids: list[int], options: argparse.Namespace) -> StreamDecoder:
    """For what follows `ids`: a text that goes on with its space, or a turn, which is a text of its own."""
    return StreamDecoder(tokenizer, after=() if options.chat else ids)


def _generate(
    generator: Generator,
    tokenizer: Tokenizer,
    batch: list[list[int]],
    options: argparse.Namespace,
    on_token: Any = None,
) -> Generation:
    return generator.generate(
        [torch.tensor(ids, dtype=torch.int64) for ids in batch],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop_tokens=tokenizer.stop_ids,
        on_token=on_token,
    )


def _encode(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    if chat:
        return tokenizer.encode_rendered(render_chat(tokenizer, [{"role": "user", "content": prompt}]))
    return tokenizer.encode_prompt(prompt)


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(options.prompt or [])
    if options.prompt_file:
        try:
            from_stdin = options.prompt_file == "-"
            text = sys.stdin.read() if from_stdin else Path(options.prompt_file).read_text(encoding="utf-8")
            prompts += [line for line in text.split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompt-file {options.prompt_file}: cannot be read ({error})") from error
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:
        raise InputError("a prompt is not UTF-8 text") from error
    if "" in prompts:
        raise InputError("--prompt is empty, expected the beginning of a text")
    if not prompts and (options.prompt_file or not options.chat):
        raise InputError("there is no prompt; give --prompt, --prompt-file or --chat")
    if not prompts and options.json:
        raise InputError("--json needs a --prompt or --prompt-file")
    return prompts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
