"""What a server that is running at an address tells of its models."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from treeflash.errors import ConfigError

ANSWER_SECONDS = 10.0
"""How long a server may take to name its models."""


def served_models(
    url: str, key: str, *, if_taken: str, if_unreachable: str
) -> list[dict[str, Any]] | None:
    """Return the list of a server's models; None if nothing listens there.

    A ConfigError is raised if the server needs another key, if the address is another program's, or
    if it cannot be reached; the last two say what to do then.
    """
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    taken = f"{url} is taken by another program; {if_taken}"
    try:
        with opener.open(request, timeout=ANSWER_SECONDS) as response:
            data: list[dict[str, Any]] = json.load(response)["data"]
            if not data or any(model["owned_by"] != "treeflash" for model in data):
                raise ConfigError(taken)
            return data
    except urllib.error.HTTPError as error:
        if error.code == 401:
            problem = f"the server at {url} needs an API key"
            raise ConfigError(f"{problem}; give its file with --api-key-file") from None
        raise ConfigError(taken) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return None
        raise ConfigError(f"{url}: {error.reason}; {if_unreachable}") from None
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        raise ConfigError(taken) from None
