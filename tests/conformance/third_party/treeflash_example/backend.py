"""The entry point."""

from treeflash.errors import BackendError, ConfigError
from treeflash_example.drafter import Drafter, DrafterModel, Head
from treeflash_example.target import Target, Verifier


class ExampleBackend:
    name, device, dtype, device_name = "example", "cpu", "float32", "NumPy"

    def __init__(self, target, drafter):
        self.target, self.model = target, drafter
        self.vocab_size, self.max_positions = target.vocab_size, target.max_positions
        self.drafter_config = drafter.config if drafter else None
        self.head = Head(drafter) if drafter and drafter.config.head else None

    def verifier(self, *, features):
        return Verifier(self.target, self.drafter_config.target_layer_ids if features else ())

    def drafter(self):
        return Drafter(self.model)

    def memory_bytes(self):
        return 0


def load(target, drafter, config):
    if config.device not in (None, "cpu"):
        raise BackendError(f"the example backend runs on cpu, not on {config.device!r}")
    if config.dtype not in (None, "float32") or config.draft_bits or config.kv_bits:
        raise ConfigError("the example backend computes in float32 and does not quantise")
    if config.cuda_graphs:
        raise ConfigError("the example backend has no CUDA graphs")
    model = Target(target)
    return ExampleBackend(model, DrafterModel(drafter, model) if drafter else None)
