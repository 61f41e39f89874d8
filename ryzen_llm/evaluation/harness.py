"""lm-evaluation-harness on this project's models (EleutherAI; `pip install 'ryzen-llm[bench]'`).

    python -m ryzen_llm.evaluation.harness run --model ryzen_llm --model_args path=MODEL --tasks arc_easy

is the harness's own command line, in which `ryzen_llm` is one model more. From Python, import this module and
call `lm_eval.simple_evaluate(model="ryzen_llm", model_args={"path": MODEL}, tasks=[...])`.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from ryzen_llm.data import StreamDecoder
from ryzen_llm.decoding import Generator
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained, render_chat

_HONOURED = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_WITHOUT_EFFECT = {
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "use_cache": True,
}
"""Values of other settings that change nothing."""


class _StopString(Exception):
    """The text has come to where the task wants it cut."""


@register_model("ryzen_llm")
class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval is not typed
    """A model of this project, as the harness sees one.

    Args:
        path: What `load_pretrained` takes.
        dtype: Of the weights, "fp32" or "bf16".
        batch_size: Sequences scored at a time, a whole number.
        device: Where to run; without CUDA, "cuda" is the CPU.
        max_length: Longest sequence in tokens; None for all that the model allows.
        max_batch_size: For "auto" batch sizes, which are not supported.

    Raises InputError as `load_pretrained` does, and for a dtype, batch size or length that cannot work.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "fp32",
        batch_size: int | str = 1,
        device: str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size is {batch_size!r}, expected a whole number of 1 or more")
        if dtype not in ("fp32", "bf16"):
            raise InputError(f"dtype is {dtype!r}, expected fp32 or bf16")
        self.batch_size = int(batch_size)
        self.path = path
        self._device = torch.device(device or "cuda")
        if self._device.type == "cuda" and not torch.cuda.is_available():  # the harness's own default
            self._device = torch.device("cpu")
        model, self._text = load_pretrained(path, dtype)
        self._model = model.to(self._device)
        most = model.config.max_position_embeddings
        self.max_length = most if max_length is None else int(max_length)
        if not 1 <= self.max_length <= most:
            raise InputError(f"max_length is {max_length}, expected 1 to {most}")
        self._generator = Generator(self._model, weights=dtype)
        self._chats = False

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._text.end_of_text_id

    @property
    def prefix_token_id(self) -> int:
        """What a text's first token is predicted from, as for transformers' models: bos, or else eos."""
        token = self._text.special.bos or self._text.special.eos
        return self._text.encode_rendered(token)[0] if token else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; of a conversation, special tokens are what their spelling says."""
        if self._chats:
            return self._text.encode_rendered(string)
        return self._text.encode(string) if add_special_tokens is False else self._text.encode_prompt(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own; asked for by the harness before conversations."""
        self._chats = bool(chat_template)
        return self._text.special.chat_template if self._chats else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation."""
        return render_chat(self._text, chat_history, add_generation_prompt)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, in disjoint windows of `max_length`."""
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = [(("", ""), *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is what greedy decoding gives."""
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for begin in range(0, len(rows), self.batch_size):
            batch = by_length[begin : begin + self.batch_size]
            # What is put behind a row does not reach it: attention is causal.
            inputs = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i][:-1]) for i in batch], True)
            hidden_states = self._model.hidden_states(inputs.to(self._device))
            for hidden, index in zip(hidden_states, batch, strict=True):
                end, length = len(rows[index]) - 1, min(len(requests[index][2]), len(rows[index]) - 1)
                targets = torch.tensor(rows[index][-length:], device=self._device)
                log_probabilities = self._model.logits(hidden[end - length : end]).float().log_softmax(-1)
                nats = log_probabilities.gather(1, targets[:, None]).double().sum()
                found[index] = float(nats), bool((log_probabilities.argmax(-1) == targets).all())
        return [found[index] for index in range(len(rows))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each prompt, up to a stop string, a stop token or the length.

        Raises InputError, before any text is made, for a setting of a task that cannot be honoured.
        """
        asked = [(prompt, _settings(settings)) for prompt, settings in (r.args for r in requests)]
        return [self._generate(prompt, settings) for prompt, settings in asked]

    def _generate(self, prompt: str, settings: dict[str, Any]) -> str:
        stops = [stop for stop in settings["until"] if stop]
        new_tokens = min(settings["max_gen_toks"], self.max_length - 1)
        ids = self.tok_encode(prompt)[-(self.max_length - new_tokens) :]
        decoder, text = StreamDecoder(self._text), ""

        def push(new: list[int]) -> None:
            nonlocal text
            if new[0] not in self._text.stop_ids:
                text += decoder.push(new)
            if any(stop in text for stop in stops):
                raise _StopString

        try:
            self._generator.generate(
                torch.tensor(ids),
                max_new_tokens=new_tokens,
                temperature=settings.get("temperature", 0.0),
                top_k=settings["top_k"],
                top_p=settings.get("top_p"),
                stop_tokens=self._text.stop_ids,
                on_token=push,
            )
            text += decoder.finish()
        except _StopString:
            pass
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    """What a task asks of a generation, by the harness's own rules: not sampling is temperature 0."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, 256))
    others = [
        f"{name}={value}"
        for name, value in settings.items()
        if name not in _HONOURED and value is not None and value != _WITHOUT_EFFECT.get(name)
    ]
    if others:
        raise InputError(
            f"the task's generation_kwargs have {', '.join(others)}, expected {', '.join(_HONOURED)}: take "
            "out what is more, or give a value without effect in --gen_kwargs, such as num_beams=1"
        )
    top_k = settings.get("top_k")
    return settings | {"top_k": None if top_k in (0, -1) else top_k}  # which keep all, elsewhere


if __name__ == "__main__":
    cli_evaluate()
