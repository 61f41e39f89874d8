"""Write a model as a Hugging Face directory, for transformers and the tools that read the same files."""

from __future__ import annotations

import argparse
import math
import sys

from ryzen_llm.errors import InputError
from ryzen_llm.interop import DTYPES, export_pretrained, load_pretrained
from ryzen_llm.pipeline import exit_with


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="as for load_pretrained: a checkpoint, run, directory or GGUF file",
    )
    parser.add_argument("--out", required=True, help="directory to write; it must not be there yet")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a file (default: 5)")
    parser.add_argument(
        "--keep-compressed",
        action="store_true",
        help="write a compressed embedding in its packed form, for load_pretrained only",
    )
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.max_shard_gb < math.inf:
            raise InputError(f"--max-shard-gb is {options.max_shard_gb}, expected a positive number")
        model, tokenizer = load_pretrained(options.model)
        written = export_pretrained(
            model,
            tokenizer,
            options.out,
            dtype=options.dtype,
            max_shard_bytes=int(options.max_shard_gb * 1e9),
            densify=not options.keep_compressed,
        )
    except InputError as error:
        return exit_with(error)
    print(f"written: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
