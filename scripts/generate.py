"""Generate text with a trained model."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from ryzen_llm.data import StreamDecoder
from ryzen_llm.decoding import Generator
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained
from ryzen_llm.pipeline import exit_with


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint, or the output directory of train.py")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens that hold this probability")
    parser.add_argument("--seed", type=int, help="makes the text repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = load_pretrained(options.model)
        prompt = tokenizer.encode(options.prompt)
        if not prompt:
            raise InputError("--prompt is empty, expected the beginning of a text")
        decoder = StreamDecoder(tokenizer)

        def stream(ids: list[int]) -> None:
            print(decoder.push(ids), end="", flush=True)

        if not options.json:
            print(options.prompt, end="", flush=True)
        out = Generator(model).generate(
            torch.tensor(prompt),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop_tokens=(tokenizer.end_of_text_id,),
            on_token=None if options.json else stream,
        )
    except InputError as error:
        return exit_with(error)
    if options.json:
        new_ids = out.new_ids[0].tolist()
        print(
            json.dumps(
                {
                    "prompt": options.prompt,
                    "text": tokenizer.decode(new_ids),
                    "ids": new_ids,
                    "tokens_per_second": out.tokens_per_second,
                    "time_to_first_token_s": out.time_to_first_token_s,
                    "stop_reason": out.stop_reason,
                }
            )
        )
    else:
        print(decoder.finish())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
