"""Perplexity of a model on a text. (lm-evaluation-harness tasks: python -m ryzen_llm.evaluation.harness)"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from ryzen_llm.errors import InputError
from ryzen_llm.evaluation import Perplexity, measure_perplexity
from ryzen_llm.interop import DTYPES, load_pretrained
from ryzen_llm.pipeline import exit_with


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 bad input, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="a checkpoint, the output directory of train.py, a Hugging Face directory or a GGUF file",
    )
    parser.add_argument("--data", type=Path, required=True, help="a text file (UTF-8)")
    parser.add_argument(
        "--context", type=int, help="longest input in tokens (default: the model's, up to 2048)"
    )
    parser.add_argument(
        "--stride", type=int, help="tokens from window to window (default: the context, no overlap)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--json", action="store_true", help="print an object instead of lines")
    options = parser.parse_args(arguments)
    try:
        text = _read(options.data)
        model, tokenizer = load_pretrained(options.model, options.dtype)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("scoring")
            found = measure_perplexity(
                model.to(device),
                tokenizer,
                text,
                context=options.context,
                stride=options.stride,
                on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    except InputError as error:
        return exit_with(error)
    except KeyboardInterrupt:
        return 130
    where = {"model": options.model, "data": str(options.data), "dtype": options.dtype, "device": device.type}
    print(json.dumps(where | asdict(found)) if options.json else _in_words(found, options.dtype))
    return 0


def _in_words(found: Perplexity, dtype: str) -> str:
    beginning = f"{found.beginning} put before the text" if found.beginning else "nothing put before the text"
    return (
        f"perplexity {found.perplexity:.4f} ({found.loss:.4f} nats per token, {found.bits_per_byte:.4f} bits "
        f"per byte, next-token accuracy {found.accuracy:.2%})\n"
        f"tokens: {found.scored_tokens:,} scored, each once, by the model's own tokenizer of "
        f"{found.vocab_size:,} tokens; {beginning}\n"
        f"windows: {found.windows:,} of at most {found.context} tokens (context), one every {found.stride} "
        f"(stride); {dtype}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # line ends as they are
    except OSError as error:
        raise InputError(f"--data {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: is not UTF-8 text") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
