"""How a request becomes a completion: its prompt, its decoding options and its constraint."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

from fastapi import Request as HTTPRequest

from treeflash.decoding.sampling import Constraint
from treeflash.serving.call_grammar import call_grammar
from treeflash.serving.engine import Completion, Engine
from treeflash.serving.errors import APIError, bad_request
from treeflash.serving.message_parser import MessageForm, MessageParser, ResponseTemplate
from treeflash.serving.schemas import AllowedTools
from treeflash.serving.settings import ANSWER_TOKENS
from treeflash.serving.thinking import ThinkingBudget
from treeflash.text.grammar import Grammar, GrammarError
from treeflash.text.infill import Infill, infill_of
from treeflash.text.options import MAX_IMAGES, Options
from treeflash.text.prompt import EncodedPrompt, encode_chat, images_of
from treeflash.text.stream import Assembler
from treeflash.text.tokenizer import Tokenizer, check_unicode

logger = logging.getLogger("treeflash.serving")


@dataclass(frozen=True, eq=False)
class Service:
    """One loaded pair, and how it is offered."""

    engine: Engine
    defaults: Options  # decoding options of requests that leave them out
    name: str  # the model's name in responses
    # what makes contexts that keep the pair in memory
    hold: Callable[[], AbstractContextManager[None]]
    # places in which requests decode and process their images, each in a thread
    image_places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    # Grammars are compiled one at a time: requests that waited for that in threads would leave none
    # for the prompts of others.
    grammar_place: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.model.tokenizer

    @cached_property
    def response_template(self) -> ResponseTemplate | None:
        """The form in which the model writes reasoning and tool calls, if it is known."""
        parser = self.engine.settings.tool_call_parser
        return ResponseTemplate.find(self.tokenizer, self.engine.model.folder, parser)

    async def compile(self, grammar: Grammar, param: str) -> Callable[[], Constraint]:
        """Compile a grammar that a field of the request asks for; see `GrammarCompiler.compile`.

        Raises an APIError if the grammar is invalid, unsupported, or takes too much to compile.
        """
        try:
            async with self.grammar_place:
                return await asyncio.to_thread(self.engine.model.grammars.compile, grammar)
        except GrammarError as error:
            raise bad_request(str(error), param, "invalid_grammar") from error
        except OSError as error:
            raise APIError(503, f"the server cannot compile grammars now: {error}") from error

    def check_defaults(self) -> None:
        """Raise a PromptError if the chat template rejects the server's default variables."""
        args = self.defaults.get("template_args")
        if args and self.tokenizer.has_chat_template:
            self.tokenizer.chat([{"role": "user", "content": "-"}], args)

    @property
    def takes_images(self) -> bool:
        return not isinstance(self.engine.model.image_processor, str)

    async def encode(self, text: str) -> EncodedPrompt:
        """Encode plain text; raises a PromptError if it is not valid Unicode."""
        check_unicode(text)
        return EncodedPrompt(await asyncio.to_thread(self.tokenizer.encode, text))

    @cached_property
    def infill(self) -> Infill:
        """Makes prompts that fill a gap; a PromptError if the tokenizer has no tokens for it."""
        return infill_of(self.tokenizer)

    async def encode_gap(self, before: str, after: str) -> EncodedPrompt:
        """Encode the texts around a gap; raises what `infill` and `Infill.encode` do."""
        return EncodedPrompt(await asyncio.to_thread(self.infill.encode, before, after))

    def check_answers(self, prompts: int, answers: int) -> None:
        """Raise an APIError for too many answers to each prompt, or to all of them."""
        if answers > (most := self.engine.settings.max_choices):
            limit = f"this server gives at most {most} answers to a request"
            raise bad_request(f"n is {answers}, and {limit}", "n")
        self.engine.check_count(prompts * answers)

    def start(
        self,
        http: HTTPRequest,
        asked: Options,
        prompts: Sequence[EncodedPrompt],
        constraint: Callable[[], Constraint] | None = None,
        *,
        answers: int = 1,
        scores_prompt: bool = False,
    ) -> Completion:
        """Start to generate the answers to each of the prompts of a request, as its options ask.

        `constraint` makes one for each answer; see `Assembler` for `scores_prompt`. Raises an
        APIError for too many answers, and the errors of `Engine.submit`.
        """
        self.check_answers(len(prompts), answers)
        options: Options = {
            "max_tokens": ANSWER_TOKENS,
            "seed": secrets.randbits(32),
            **self.defaults,
            **asked,
        }
        model = self.engine.model
        text = model.configure(options)
        started: list[Assembler] = []
        for prompt in prompts:
            limited = text
            if "max_tokens" not in asked:
                limited = replace(text, decode=self.engine.shorten(prompt.token_ids, text.decode))
            first = model.assemble(
                prompt,
                limited,
                constraint,
                scores_prompt=scores_prompt,
                cache_salt=http.state.cache_salt,
            )
            started += first.answers(answers)
        return self.engine.submit(started, prompts=len(prompts))


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation, and the form of the assistant's next message."""

    # the messages so far, in the form that chat templates read
    messages: Sequence[Mapping[str, Any]]
    # variables of the chat template, beside the server's
    template_args: Mapping[str, Any] = field(default_factory=dict)
    # whether the model reasons first, and the field of the request that says so; None leaves it to
    # the server, and `adaptive` turns it on for models that support it
    reasoning: tuple[bool | Literal["adaptive"], str] | None = None
    tools: AllowedTools = field(default_factory=AllowedTools)  # the calls that the message may have
    continues: bool = False  # whether the last of the messages is the beginning of this one
    # the grammar of the content, and the field of the request that asks for it
    grammar: tuple[Grammar, str] | None = None
    thinking_budget: int | None = None  # most tokens of the reasoning; None sets no limit

    async def encode(self, service: Service) -> EncodedPrompt:
        """Encode the prompt, with the server's system message if it has none.

        Raises a PromptError if the chat template rejects the messages or an image is not usable,
        and an APIError if the model does not support tools or reasoning.
        """
        messages, variables = self.messages, self.variables(service)
        if self.tools.functions:
            if service.response_template is None or not service.tokenizer.knows_tools:
                raise bad_request(
                    "tools are not supported with this model, because its chat template does not "
                    "support tools or the form of its calls is unknown; remove tools, or start the "
                    "server with --tool-call-parser",
                    "tools",
                )
            variables["tools"] = list(self.tools.functions)
        system = service.defaults.get("system")
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        encode = partial(
            encode_chat,
            service.tokenizer,
            messages,
            variables,
            continues=self.continues,
            processor=service.engine.model.image_processor,
            max_images=service.defaults.get("max_images", MAX_IMAGES),
        )
        has_images = any(map(images_of, messages))
        async with service.image_places if has_images else nullcontext():
            return await asyncio.to_thread(encode)

    def variables(self, service: Service) -> dict[str, Any]:
        """Return the variables of the chat template: the server's defaults, then the request's.

        Raises an APIError if the model should reason and does not support it.
        """
        variables = {**(service.defaults.get("template_args") or {})}
        if self.reasoning is not None:
            thinks, param = self.reasoning
            if service.tokenizer.knows_thinking:
                variables["enable_thinking"] = bool(thinks)
            elif thinks is True:
                raise bad_request(f"this model does not support reasoning; remove `{param}`", param)
        return {**variables, **self.template_args}

    async def start(
        self, service: Service, http: HTTPRequest, asked: Options, *, answers: int = 1
    ) -> tuple[Completion, list[MessageParser]]:
        """Start to generate the message with the options that were asked for.

        Returns the completion and a parser for each answer. Raises the errors of `encode`,
        `Service.compile` and `Service.start`.
        """
        encoded = await self.encode(service)
        form = None
        if service.response_template is not None:
            assert encoded.text is not None
            tools, calls_only = self.tools.functions, self.tools.must_call
            make = partial(MessageForm.of, service.response_template, encoded.text, tools)
            form = await asyncio.to_thread(make, calls_only=calls_only)
        grammar = await asyncio.to_thread(self._enforced_grammar, service, form)
        constraint = None if grammar is None else await service.compile(*grammar)
        if self.thinking_budget is not None and form is not None:
            constraint = self._limit_thinking(self.thinking_budget, service, form, constraint)
        completion = service.start(http, asked, [encoded], constraint, answers=answers)
        parsers = [MessageParser(form, service.tokenizer) for _ in completion.answers]
        return completion, parsers

    def _limit_thinking(
        self,
        budget: int,
        service: Service,
        form: MessageForm,
        constraint: Callable[[], Constraint] | None,
    ) -> Callable[[], Constraint] | None:
        """Return the constraint with a limit on the reasoning, where its ends are known."""
        if (ends := form.template.reasoning_ends(begun=form.in_reasoning)) is None:
            return constraint
        tokenizer, vocab_size = service.tokenizer, service.engine.model.backend.vocab_size

        def make() -> Constraint:
            other = None if constraint is None else constraint()
            return ThinkingBudget(budget, *ends, tokenizer, vocab_size, other)

        return make

    def _enforced_grammar(
        self, service: Service, form: MessageForm | None
    ) -> tuple[Grammar, str] | None:
        """Return the grammar of the content or of the calls, if either is enforced, and its field.

        A message of calls has no content: a grammar of the content leaves the calls free.
        """
        tools = self.tools
        if self.grammar is None and not tools.must_call and not tools.strict:
            return None
        if self.grammar is None or tools.must_call:
            assert form is not None
            param = "tool_choice" if tools.must_call else "tools"
            calls = call_grammar(form.template, tools, free=not tools.must_call)
            if calls is None and not tools.must_call:
                logger.info("strict is ignored: the calls of this model cannot be enforced")
                return None
            grammar = _enforced(calls, param)
        else:
            grammar, param = self.grammar
            if tools.functions:
                assert form is not None
                calls = call_grammar(form.template, tools, free=False)
                grammar = grammar.either(_enforced(calls, param))
        if form is not None and (form.in_reasoning or self._may_think(service)):
            grammar = form.template.prepend_reasoning(
                grammar, service.tokenizer, begun=form.in_reasoning
            )
        return grammar, param

    def _may_think(self, service: Service) -> bool:
        """Return whether the model may begin to reason: thinking is on, or is never off."""
        if not service.tokenizer.knows_thinking:
            assert service.response_template is not None
            opening = service.response_template.reasoning_opening
            return opening is not None and opening in service.tokenizer.chat_template
        return bool(self.variables(service).get("enable_thinking", service.tokenizer.thinking))


def _enforced(calls: Grammar | None, param: str) -> Grammar:
    """Return the grammar of calls that a field enforces; an APIError if they cannot be."""
    if calls is None:
        raise bad_request(
            f"{param} is not supported with this model and these tools, because the format of its "
            "calls cannot be enforced; set tool_choice to auto, and do not request structured "
            "output",
            param,
        )
    return calls
