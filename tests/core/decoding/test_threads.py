"""The number of threads on a machine that other programs use too; a stub is its clock."""

import pytest

from treeflash.decoding.threads import INTERVAL_S, ProcessorTimes, ThreadPolicy

PASS_S = 0.02


class Machine:
    """Processors that a process with spinning threads shares with busy programs."""

    def __init__(self, processors, others=0.0):
        self.processors = processors
        self.others = others  # processors that other programs ask for
        self.elapsed = self.busy = self.own = 0.0

    def read(self):
        return ProcessorTimes(self.elapsed, self.busy, self.own)

    def run(self, threads, seconds=PASS_S):
        """Let some threads spin: programs share the processors fairly if there are too few."""
        share = min(1.0, self.processors / (threads + self.others))
        self.elapsed += seconds
        self.own += threads * share * seconds
        self.busy += (threads + self.others) * share * seconds

    def policy(self, most=None):
        return ThreadPolicy(most or self.processors, self.processors, self.read, self.clock)

    def clock(self):
        return self.elapsed


def decode(machine, policy, passes):
    """The number of threads of each of some passes."""
    numbers = []
    for _ in range(passes):
        numbers.append(policy.update())
        machine.run(numbers[-1])
    return numbers


@pytest.mark.parametrize(
    ("processors", "others", "most", "threads"),
    [
        pytest.param(2, 0, None, 2, id="idle"),
        pytest.param(2, 0.2, None, 2, id="nearly idle"),
        pytest.param(2, 0.4, None, 2, id="half of a processor is free"),
        pytest.param(2, 1, None, 1, id="one busy program"),
        pytest.param(2, 2, None, 1, id="two busy programs"),
        pytest.param(1, 3, None, 1, id="one thread is the least"),
        pytest.param(16, 5, None, 11, id="one for each free processor"),
        # Where PyTorch takes one thread for each pair of hyper-threads, the others do no harm.
        pytest.param(16, 5, 8, 8, id="pairs of hyper-threads"),
    ],
)
def test_threads_give_way_to_busy_programs_and_stay_so(processors, others, most, threads):
    machine = Machine(processors, others)
    numbers = decode(machine, machine.policy(most), 200)
    assert set(numbers[100:]) == {threads}


def test_the_number_follows_the_machine_while_a_text_is_decoded():
    machine = Machine(2)
    policy = machine.policy()
    passes = round(2 * INTERVAL_S / PASS_S)
    assert decode(machine, policy, passes)[-1] == 2
    machine.others = 1
    assert decode(machine, policy, passes)[-1] == 1
    machine.others = 0
    assert decode(machine, policy, passes)[-1] == 2


def test_what_others_used_while_models_were_loaded_decides_the_first_pass():
    machine = Machine(2, others=1)
    policy = machine.policy()
    machine.run(1, seconds=3.0)
    assert policy.update() == 1


def test_the_number_does_not_flap_around_a_limit():
    machine = Machine(2, others=0.8)
    policy = machine.policy()
    decode(machine, policy, 50)
    numbers = []
    for others in [0.3, 0.45] * 10:
        machine.others = others
        numbers += decode(machine, policy, 20)
    assert set(numbers) == {1}


def test_times_that_run_backwards_change_nothing():
    machine = Machine(2)
    policy = machine.policy()
    decode(machine, policy, 20)
    machine.busy -= 5.0  # a processor was switched off
    assert set(decode(machine, policy, 50)) == {2}
    assert policy.others == 0
