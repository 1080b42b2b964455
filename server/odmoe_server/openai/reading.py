"""What answers carry of tokens where it was asked for, in vLLM's shapes: ids, log probabilities of prompts, experts.

Knows tokens' texts; knows no engine and no stream.

T tokens, L MoE layers, K experts a token.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from odmoe_server.answering import Answer
from odmoe_server.engine_api import Token
from odmoe_server.generation import Ending
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.generating import Generating
from odmoe_server.openai.logprobs import finite
from odmoe_server.text import TextCodec

if TYPE_CHECKING:
    from torch import Tensor

# Log probabilities of prompts in one answer, and tokens whose experts it lists: so much is written at once.
MAX_PROMPT_LOGPROBS: Final = 100_000
MAX_ROUTED_TOKENS: Final = 8192


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one request wants to hear of tokens. `prompts`: each choice's."""

    text: TextCodec
    prompts: Sequence[Sequence[int]]
    ids: bool = False
    num_prompt_logprobs: int | None = None

    @classmethod
    def asked(cls, asked: Generating, *, text: TextCodec, prompts: Sequence[Sequence[int]]) -> "Reading":
        """As a request has it."""
        return cls(
            text=text,
            prompts=prompts,
            ids=bool(asked.return_token_ids),
            num_prompt_logprobs=asked.prompt_logprobs,
        )

    def of_prompt(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """Of a choice's prompt; `tokens` are its own as the engine has read them."""
        found: dict[str, Any] = {"prompt_token_ids": list(self.prompts[index])} if self.ids else {}
        if self.num_prompt_logprobs is not None:
            most = self.num_prompt_logprobs
            found["prompt_logprobs"] = [_scores(token, self.text, most=most) for token in tokens]
        return found

    def of_tokens(self, ids: Sequence[int]) -> dict[str, Any]:
        """Of what a choice, or a piece of it, is made of."""
        return {"token_ids": list(ids)} if self.ids else {}

    def of_answer(self, answer: Answer) -> dict[str, Any]:
        """Of a whole choice."""
        return {**self.of_tokens(answer.ids), **routed_experts(answer.ending)}


def routed_experts(ending: Ending) -> dict[str, Any]:
    """Base64 of a .npy file: an array [T, L, K] of uint8, or uint16 where experts have higher numbers."""
    if not ending.experts:
        return {}
    return {"routed_experts": base64.b64encode(_npy(ending.experts)).decode("ascii")}


def _npy(pieces: "Sequence[Tensor]") -> bytes:
    experts_TLK = np.concatenate([piece.numpy() for piece in pieces])
    file = io.BytesIO()
    np.save(file, experts_TLK.astype(np.uint8 if experts_TLK.max() < 256 else np.uint16), allow_pickle=False)
    return file.getvalue()


def _scores(token: Token, text: TextCodec, *, most: int) -> dict[str, Any] | None:
    """One place of a prompt: the likeliest tokens and its own, by their ids. Null for the first, which follows none."""
    if token.logprob is None:
        return None
    places = [(token.token_id, token.logprob, token.rank)]
    places += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(token.top[:most], 1)]
    return {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": text.token_text(token_id)}
        for token_id, logprob, rank in places
    }


def check_size(asked: Generating, prompts: Sequence[Sequence[int]], *, max_tokens: Sequence[int]) -> None:
    """Of what one answer would have to carry; prompts and longest answers of all its choices. Raises InvalidRequest."""
    num_prompt = sum(map(len, prompts))
    if asked.num_prompt_logprobs is not None:
        num_places = num_prompt * (1 + asked.num_prompt_logprobs)
        if num_places > MAX_PROMPT_LOGPROBS:
            text = f"an answer has at most {MAX_PROMPT_LOGPROBS} log probabilities of prompts, not {num_places}"
            param = "echo" if asked.prompt_logprobs is None else "prompt_logprobs"
            raise InvalidRequest(f"On this server {text}: choices, times tokens, times alternatives.", param=param)
    if asked.return_routed_experts and num_prompt + sum(max_tokens) > MAX_ROUTED_TOKENS:
        raise InvalidRequest(
            f"On this server an answer lists the experts of at most {MAX_ROUTED_TOKENS} tokens; prompts and"
            f" 'max_tokens' of all choices come to {num_prompt + sum(max_tokens)}. Set 'max_tokens'.",
            param="return_routed_experts",
        )


def offsets(ids: Sequence[int], *, shown: str, text: TextCodec) -> list[int]:
    """Where each token of a prompt begins in the text that is shown for it. What is not shown, such as a token the
    tokenizer put in front, has no length; tokens that make a character together share its beginning."""
    detokeniser = text.detokeniser(skip_special_tokens=False)
    at, found = 0, []
    for token_id in ids:
        found.append(at)
        piece = detokeniser.push(token_id)
        # Behind a token that is not shown, some tokenizers have a space that the text does not begin with.
        for form in (piece, piece.lstrip(" ")):
            if form and shown.startswith(form, at):
                at += len(form)
                break
    return found
