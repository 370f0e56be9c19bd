"""An image and a question through the SDKs of every protocol."""

from __future__ import annotations

import anthropic
import openai
from servers import NAME
from stub_images import base64_of, url_of

TOKENS, QUESTION = 12, "?"


def ask_chat(url: str, image: bytes) -> str:
    parts = [{"type": "image_url", "image_url": {"url": url_of(image)}}]
    content = [*parts, {"type": "text", "text": QUESTION}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": content}], max_tokens=TOKENS
        )
    return str(answer.choices[0].message.content)


def ask_responses(url: str, image: bytes) -> str:
    parts = [{"type": "input_image", "image_url": url_of(image), "detail": "auto"}]
    content = [*parts, {"type": "input_text", "text": QUESTION}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.responses.create(
            model=NAME, input=[{"role": "user", "content": content}], max_output_tokens=TOKENS
        )
    return answer.output_text


def ask_messages(url: str, image: bytes) -> str:
    source = {"type": "base64", "media_type": "image/png", "data": base64_of(image)}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(
            model=NAME, messages=[{"role": "user", "content": content}], max_tokens=TOKENS
        )
    return "".join(block.text for block in answer.content)


ASK = [ask_chat, ask_responses, ask_messages]
