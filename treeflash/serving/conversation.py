"""A conversation to continue, whichever API it came through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HTTPRequest

from treeflash.decoding.constraints import Constraint
from treeflash.serving.completion import Completion
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.grammars import Grammar
from treeflash.serving.message_parser import MessageForm, MessageParser
from treeflash.serving.schemas import DecodingSchema
from treeflash.serving.service import Service

MESSAGE_TOKENS = 1024
"""Tokens at the end of a prompt in which the beginning of the assistant's message is found."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What the assistant's next message is to be.

    Attributes:
        messages: so far, as chat templates read them.
        template_args: further variables of the chat template.
        tools: functions that may be called, in OpenAI's form.
        must_call: whether the message must consist of calls.
        parallel: whether it may have several.
        grammar: of the content, and the field of the request that asks for it.
    """

    messages: Sequence[Mapping[str, Any]]
    template_args: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    must_call: bool = False
    parallel: bool = True
    grammar: tuple[Grammar, str] | None = None

    async def encode(self, service: Service) -> list[int]:
        """The token ids of the prompt.

        Raises:
            PromptError: the chat template rejects the messages.
            APIError: the model has no tools.
        """
        variables = dict(self.template_args)
        if self.tools:
            if service.response_template is None or not service.tokenizer.knows_tools:
                raise APIError(
                    BAD_REQUEST,
                    "tools are not supported with this model: its chat template does not have "
                    "them, or transformers does not know how it writes calls",
                    param="tools",
                )
            variables["tools"] = list(self.tools)
        return await service.encode_chat(self.messages, variables)

    async def start(self, service: Service, http: HTTPRequest, body: DecodingSchema) -> Answers:
        """Begin to generate the message.

        Args:
            service: to generate with.
            http: the request.
            body: how to decode.

        Raises:
            PromptError, ConfigError, APIError: see `encode`, `Service.submit` and
                `GrammarCompiler.compile`.
        """
        prompt_ids = await self.encode(service)
        form = None
        if service.response_template is not None:
            end = prompt_ids[-MESSAGE_TOKENS:]
            prompt = await asyncio.to_thread(service.tokenizer.verbatim.decode, end)
            form = MessageForm(service.response_template, prompt, self.tools)
        constraint = await asyncio.to_thread(self._constraint, service, form)
        completion = service.submit(http, body, prompt_ids, constraint)
        stop = completion.texts[0].stop
        parsers = [MessageParser(form, service.tokenizer, stop) for _ in completion.texts]
        return Answers(completion, parsers)

    def _constraint(
        self, service: Service, form: MessageForm | None
    ) -> Callable[[], Constraint] | None:
        strict = any(tool["function"].get("strict") for tool in self.tools)
        if self.grammar is not None:
            grammar, param = self.grammar
            if self.must_call or strict:
                raise APIError(
                    BAD_REQUEST,
                    f"{param} is for the content; it cannot be joined with tools that must be "
                    "called or are strict",
                    param=param,
                )
        elif self.must_call or strict:
            assert form is not None
            param = "tool_choice" if self.must_call else "tools"
            grammar = form.template.calls(
                self.tools, required=self.must_call, parallel=self.parallel, param=param
            )
        else:
            return None
        if form is not None and (form.reasoning or self._may_think(service)):
            grammar = form.template.after_reasoning(grammar, begun=form.reasoning)
        return service.grammars.compile(grammar, param)

    def _may_think(self, service: Service) -> bool:
        """Whether the model may begin to think by itself."""
        if not service.tokenizer.knows_thinking:
            return True
        variables = {**(service.defaults.get("template_args") or {}), **self.template_args}
        return bool(variables.get("enable_thinking", service.tokenizer.thinking))


@dataclass(frozen=True, eq=False)
class Answers:
    """The messages while they are generated.

    Attributes:
        completion: makes them.
        parsers: one for each.
    """

    completion: Completion
    parsers: Sequence[MessageParser]
