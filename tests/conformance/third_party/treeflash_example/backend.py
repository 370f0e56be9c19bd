"""The entry point, and what is checked before models are fetched."""

from treeflash.decoding.backend_base import check_settings
from treeflash.decoding.probe import check_trees
from treeflash.errors import BackendError, ConfigError
from treeflash_example.drafter import Drafter, DrafterModel, Head, check_drafter  # noqa: F401
from treeflash_example.state import KVCache, State
from treeflash_example.target import Target, Verifier


class ExampleBackend:
    name, device, dtype, device_name = "example", "cpu", "float32", "NumPy"
    inexact = "float32 rounding may differ"
    stores_states = False
    images = "the example backend runs no images"

    def __init__(self, target, drafter):
        self.target, self.model = target, drafter
        self.verifier = Verifier(target, drafter.config.target_layer_ids if drafter else ())
        self.drafter = Drafter(drafter) if drafter else None
        self.vocab_size, self.max_positions = target.vocab_size, target.max_positions
        self.drafter_config = drafter.config if drafter else None
        self.head = Head(drafter) if drafter and drafter.config.head else None

    def open(self, capacity, *, drafts):
        drafter = KVCache(self.model.new_cache()) if drafts else None
        return State(KVCache(self.target.new_cache()), drafter)

    def state_nbytes(self, capacity, *, drafts):
        caches = [self.target.new_cache(), self.model.new_cache() if drafts else []]
        return sum(4 * capacity * 2 * x.shape[1] * x.shape[3] for cache in caches for x in cache)

    def check_trees(self):
        check_trees(self)


def check_config(config):
    check_settings(config, "example")
    if config.dtype not in (None, "float32"):
        raise ConfigError(f"dtype must be float32 on the example backend, got {config.dtype}")


def choose_device(name):
    if name not in (None, "cpu"):
        raise BackendError(f"device must be cpu on the example backend, got {name!r}")


def load(target, drafter, config):
    check_config(config)
    choose_device(config.device)
    model = Target(target)
    return ExampleBackend(model, DrafterModel(drafter, model) if drafter else None)
