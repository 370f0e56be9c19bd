"""The thread of a scheduler: an error ends sequences, and never the thread."""

import queue

from fake_models import PROMPT, SCRIPT, config_of, scripted

from treeflash.decoding import Request, Scheduler
from treeflash.decoding.scheduler_thread import SchedulerThread


def test_an_error_of_the_receiver_ends_the_sequences_and_not_the_thread():
    """Nobody would answer later requests, and they would wait for ever."""
    backend, answers = scripted(SCRIPT), queue.SimpleQueue()

    def receive(events):
        for request, step in events:
            if request.tag == "faulty":
                raise KeyError("no such token")
            answers.put(step)

    thread = SchedulerThread(lambda: Scheduler(backend), receive, answers.put, stays=True)
    thread.start()
    scheduler = thread.made.result()
    for tag in ("faulty", "good"):
        request = Request(prompt_ids=PROMPT, config=config_of(max_tokens=1), tag=tag)
        assert thread.call(lambda request=request: scheduler.submit(request))
        if tag == "faulty":
            assert isinstance(answers.get(timeout=60), KeyError)
    assert answers.get(timeout=60).tokens == (SCRIPT[4],)
    thread.stop()
    assert all(state.closed for state in backend.states)
