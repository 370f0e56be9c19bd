"""What the requests of several endpoints have in common, and what they may ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from treeflash.config import MAX_BUDGET, Method
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.text.options import Options

MAX_LOG_PROBS = 20
TokenId = Annotated[int, Field(ge=0, strict=False)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Schema(BaseModel):
    """A JSON object whose unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Schema):
    """`stream_options`: of OpenAI's, and what this server can add.

    Attributes:
        include_usage: send the usage in a last chunk without choices.
        continuous_usage_stats: with that, each chunk has the usage so far, as vLLM's have.
        include_obfuscation: only False; nothing is padded.
        include_draft_trees: send each iteration's draft tree and accepted path.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None
    include_draft_trees: bool | None = None


class DecodingSchema(Schema):
    """The fields that say how to decode.

    `method` and `budget` are those of the command line: they change the speed, never the text.
    """

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: FiniteFloat | None = Field(None, ge=0)
    top_p: FiniteFloat | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: FiniteFloat | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    # Larger ones than OpenAI's overflow: the logits would not be finite.
    presence_penalty: FiniteFloat | None = Field(None, ge=-2, le=2)
    frequency_penalty: FiniteFloat | None = Field(None, ge=-2, le=2)
    repetition_penalty: FiniteFloat | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1)
    method: Method | None = None
    budget: Annotated[int, Field(ge=1, le=MAX_BUDGET)] | Literal["auto"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # names the client's own user, which changes nothing here
    # vllm-router adds these to every request, at values that change nothing.
    no_stop_trim: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    return_hidden_states: Literal[False] | None = None

    @property
    def usage_in_chunks(self) -> bool:
        """Whether each chunk of the stream is to have the usage so far."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)

    def options(self) -> Options:
        """The decoding options that were given."""
        if self.stream_options is not None and not self.stream:
            raise APIError(
                BAD_REQUEST,
                "stream_options is for streams; set stream to true, or leave it out",
                param="stream_options",
            )
        names = Options.__annotations__.keys()
        given: dict[str, Any] = {
            name: value
            for name in type(self).model_fields
            if name in names and (value := getattr(self, name)) is not None
        }
        if self.ignore_eos:
            given["stop_token_ids"] = ()
        options: Options = given  # type: ignore[assignment]
        return options
