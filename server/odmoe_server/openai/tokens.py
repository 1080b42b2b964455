"""POST /tokenize and /detokenize, in vLLM's words and llama.cpp's. Knows the text codec; asks no engine."""

from dataclasses import dataclass

from odmoe_server.catalog import Catalog
from odmoe_server.openai.answers import Detokenized, Tokens
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.schemas import DetokenizeRequest, TokenizeRequest
from odmoe_server.openai.tools_kit import ToolKit
from odmoe_server.openai.tools_messages import for_template
from odmoe_server.text import TextCodec


@dataclass(frozen=True, kw_only=True)
class TokenService:
    """Turns texts into tokens and back."""

    text: TextCodec
    catalog: Catalog
    kit: ToolKit

    async def tokenize(self, asked: TokenizeRequest) -> Tokens:
        """Raises UnknownModel or InvalidRequest. vLLM adds a prompt's special tokens unless told not to, llama.cpp
        only if told."""
        self._check(asked.model)
        ids = await self._ids(asked)
        found = Tokens(tokens=list(ids), count=len(ids), max_model_len=self.catalog.context_length)
        if not asked.return_token_strs:
            return found
        return found.model_copy(update={"token_strs": [self.text.token_text(token_id) for token_id in ids]})

    async def detokenize(self, asked: DetokenizeRequest) -> Detokenized:
        """Raises UnknownModel or InvalidRequest."""
        self._check(asked.model)
        wrong = [token_id for token_id in asked.tokens if token_id >= self.text.vocab_size]
        if wrong:
            raise InvalidRequest(f"This model has no token {wrong[0]}.", param="tokens")
        text = await self.text.decode(asked.tokens)
        return Detokenized(prompt=text, content=text)

    async def _ids(self, asked: TokenizeRequest) -> tuple[int, ...]:
        if asked.messages is not None:
            messages = for_template(asked.messages)
            return await self.kit.prompt_ids(messages, rendering=asked.rendering(messages))
        if asked.content is not None:
            return await self.text.encode(asked.content, add_special_tokens=bool(asked.add_special))
        return await self.text.encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens is not False)

    def _check(self, model: str | None) -> None:
        if model is not None:
            self.catalog.check(model)
