"""Coding agents, and how each learns of a server: its address, its key, its model and its limits.

An agent gets environment variables and arguments for one run. Nothing is written into its
configuration. A new agent is one more entry of `AGENTS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MAX_OUTPUT = 16_384
"""Tokens of an answer at most: the server keeps memory free for all that an answer may have."""
KEY_VARIABLE = "TREEFLASH_API_KEY"
PATIENCE_MS = 3_600_000
"""Milliseconds without an event after which an agent gives a stream up; their own limit is five
minutes, in which a processor may not have read a long prompt or written a long call."""
MIN_COMPACT_WINDOW = 100_000
"""The smallest value of CLAUDE_CODE_AUTO_COMPACT_WINDOW that Claude Code takes."""


@dataclass(frozen=True)
class Endpoint:
    """A running server, as an agent has to know it."""

    url: str  # the server's root, without a path
    key: str  # an API key; any text if the server has none
    model: str  # the model's name
    context: int  # tokens of prompt and answer together

    @property
    def output(self) -> int:
        """The most tokens that an agent should ask for in one answer."""
        return min(self.context // 4, MAX_OUTPUT)


@dataclass(frozen=True)
class Agent:
    """A coding agent."""

    name: str  # in messages
    command: str  # the program
    install: str  # a command that installs it
    # This makes the variables that the program gets; a variable that is None is removed.
    environment: Callable[[Endpoint], Mapping[str, str | None]]
    # This makes the arguments that come before the user's.
    arguments: Callable[[Endpoint], Sequence[str]] = lambda endpoint: ()


def _claude(endpoint: Endpoint) -> dict[str, str | None]:
    models = ("MODEL", *(f"DEFAULT_{size}_MODEL" for size in ("HAIKU", "SONNET", "OPUS")))
    variables: dict[str, str | None] = {
        "ANTHROPIC_BASE_URL": endpoint.url,
        "ANTHROPIC_AUTH_TOKEN": endpoint.key,
        # The user's own key must not reach this server, and takes precedence over the token.
        "ANTHROPIC_API_KEY": None,
        **{f"ANTHROPIC_{model}": endpoint.model for model in models},
        "CLAUDE_CODE_SUBAGENT_MODEL": endpoint.model,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(endpoint.output),
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(endpoint.context),
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": str(PATIENCE_MS),
        # The header is a line at the beginning of the prompt that differs between conversations,
        # so that no prefix of them would be found in the cache.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
    }
    if endpoint.context < MIN_COMPACT_WINDOW:
        percent = 80 * endpoint.context // MIN_COMPACT_WINDOW
        variables["CLAUDE_AUTOCOMPACT_PCT_OVERRIDE"] = str(max(1, percent))
    return variables


def _codex(endpoint: Endpoint) -> list[str]:
    settings = {
        "model": endpoint.model,
        "model_context_window": endpoint.context,
        "model_provider": "treeflash",
        "model_providers.treeflash.name": "treeflash",
        "model_providers.treeflash.base_url": f"{endpoint.url}/v1",
        "model_providers.treeflash.stream_idle_timeout_ms": PATIENCE_MS,
        "model_providers.treeflash.wire_api": "responses",
        "model_providers.treeflash.env_key": KEY_VARIABLE,
    }
    # A text or a number has the same form in JSON as in TOML, which Codex reads.
    return [part for k, v in settings.items() for part in ("-c", f"{k}={json.dumps(v)}")]


def _opencode(endpoint: Endpoint) -> dict[str, str | None]:
    limit = {"context": endpoint.context, "output": endpoint.output}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "treeflash",
        "options": {"baseURL": f"{endpoint.url}/v1", "apiKey": endpoint.key},
        "models": {endpoint.model: {"name": endpoint.model, "limit": limit}},
    }
    model = f"treeflash/{endpoint.model}"
    config = {"model": model, "small_model": model, "provider": {"treeflash": provider}}
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(config)}


AGENTS = {
    "claude": Agent(
        "Claude Code", "claude", "npm install -g @anthropic-ai/claude-code", environment=_claude
    ),
    "codex": Agent(
        "Codex",
        "codex",
        "npm install -g @openai/codex",
        environment=lambda endpoint: {KEY_VARIABLE: endpoint.key},
        arguments=_codex,
    ),
    "opencode": Agent("opencode", "opencode", "npm install -g opencode-ai", environment=_opencode),
}
"""The agents by the name that `treeflash launch` knows them by."""
