"""A target whose responses are known."""

import pytest

from treeflash.testing.tokenizer import END


class EchoResponder:
    """Repeats the prompt's last tokens; `interrupt_at` counts the responses before an interrupt."""

    backend, dtype, max_positions = "echo", "float32", 400

    def __init__(self, interrupt_at: int | None = None, **attributes: str) -> None:
        self.interrupt_at = interrupt_at
        self.target = "target"
        self.asked = []
        vars(self).update(attributes)

    def respond(self, requests, stop_token_ids, slots):
        assert END in stop_token_ids
        for index in reversed(range(len(requests))):
            if len(self.asked) == self.interrupt_at:
                raise KeyboardInterrupt
            self.asked.append(requests[index])
            yield index, [*requests[index].prompt_ids[-2:], END]


@pytest.fixture
def echo():
    """Makes a responder that repeats the end of each prompt."""
    return EchoResponder
