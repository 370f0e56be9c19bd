"""Text after images with MLX equals transformers', and the PyTorch backend's draft by draft."""

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_vlm")
pytest.importorskip("torch")

import mlx.core as mx
import transformers
import treeflash_cuda.images as cuda_images
import treeflash_mlx.images as mlx_images
import treeflash_mlx.target as mlx_target
from failures import failing
from image_models import picture, random_model, random_processors, reference, save_published
from treeflash_cuda.backend import load as load_cuda
from treeflash_mlx.backend import load as load_mlx

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.image_processor import image_samples
from treeflash.decoding.images import PromptImages
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.testing.comparisons import tokens_of

CPU = LoadConfig(device="cpu", dtype="float32")
TOKENS = 10
WITH_AXES = "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"
"""Families whose rotary positions are not columns."""
OF_PYTORCH = *WITH_AXES, "lfm2_vl", "gemma3", "mistral3", "pixtral"
FAMILIES = *OF_PYTORCH, "gemma4", "gemma4 small"
PROMPTS = (
    ("ab<image>cd", [picture(1)]),
    ("<image>ef<image>gh", [picture(1), picture(2, 24, 16)]),
    ("ab<image>cd", [picture(3)]),
)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """A model of transformers, and its weights in MLX and, if it runs such images, in PyTorch."""
    transformers.logging.set_verbosity_error()
    family, published = request.param, tmp_path_factory.mktemp("mlx")
    model, before = random_model(family), mx.default_device()
    save_published(family, model, published)
    model.save_pretrained(saved := tmp_path_factory.mktemp("cuda"))
    with random_processors(family, cuda_images, mlx_images):
        cuda = load_cuda(saved, None, CPU) if family in OF_PYTORCH else None
        yield model, load_mlx(published, None, CPU), cuda
    mx.set_default_device(before)


def decode(backend, prompts, size=1000, cache=None):
    """The steps after prompts, decoded together in chunks of a size."""
    config = SchedulerConfig(prefill_chunk=size, lone_prefill_chunk=size)
    decoding = DecodeConfig(method="suffix", budget=8, max_tokens=TOKENS)
    steps = {Request(prompt_ids=ids, images=x, config=decoding): [] for ids, x in prompts}
    for request, step in Scheduler(backend, config, prefix_cache=cache).decode(steps):
        steps[request].append(step)
    return list(steps.values())


def texts(sequences):
    return [tokens_of(steps) for steps in sequences]


def test_text_is_that_of_generate_in_a_batch_with_other_images_and_text(models):
    model, backend, _ = models
    assert not isinstance(backend.images, str), backend.images
    prompts = [backend.images.encode(*prompt) for prompt in PROMPTS]
    prompts.append(([1, *map(ord, "abcdabcd")], None))
    expected = [reference(model, *prompt, TOKENS) for prompt in prompts]
    for size in (1000, 5, 1):
        assert texts(decode(backend, prompts, size)) == expected
    cache = PrefixCache(1 << 30)
    assert texts(decode(backend, prompts[:1], 5, cache)) == expected[:1]
    (again,), (other,) = (decode(backend, [prompts[i]], 5, cache) for i in (0, 2))
    assert texts([again, other]) == [expected[0], expected[2]]
    assert again[0].cached_tokens == len(prompts[0][0]) - 1
    assert other[0].cached_tokens <= prompts[0][1].images[0].first


@pytest.mark.parametrize("models", OF_PYTORCH, indirect=True, scope="module")
def test_equal_arrays_give_the_same_trees_and_acceptances(models):
    _, mlx, cuda = models
    prompts = [cuda.images.encode(*prompt) for prompt in PROMPTS]
    for mine, theirs in zip(decode(mlx, prompts), decode(cuda, prompts), strict=True):
        assert [step.tokens for step in mine] == [step.tokens for step in theirs]
        for one, two in zip(mine[1:], theirs[1:], strict=True):
            assert one.tree.tokens.tolist() == two.tree.tokens.tolist()
            assert one.path.tolist() == two.path.tolist()


@pytest.mark.parametrize("models", WITH_AXES, indirect=True, scope="module")
def test_without_a_shift_images_are_refused_at_load(models, monkeypatch):
    _, mlx, _ = models
    monkeypatch.setattr(PromptImages, "shift", 0)
    processor = mlx.target.processor
    mlx.check_images(processor, image_samples(processor))
    refusal, mlx.images = mlx.images, processor
    assert isinstance(refusal, str)


@pytest.mark.parametrize("models", ["qwen2_vl"], indirect=True, scope="module")
def test_without_a_tower_that_works_the_target_takes_text(models, monkeypatch, tmp_path, caplog):
    save_published("qwen2_vl", models[0], tmp_path)
    with failing(mlx_target, "load_tower", ValueError("no such weight\nin the file")):
        backend = load_mlx(tmp_path, None, CPU)
    assert backend.images == "mlx-vlm cannot load its vision tower (no such weight)"
    monkeypatch.setattr(PromptImages, "shift", 0)
    backend = load_mlx(tmp_path, None, CPU)
    assert (backend.target.tower, type(backend.images)) == (None, str)
    assert caplog.messages == [f"{backend.images}; the target takes no images"]


def test_without_images_no_tower_is_loaded(models, tmp_path):
    model, backend, _ = models
    family = backend.target.processor._processor.family
    save_published(family, model, tmp_path)
    text = load_mlx(tmp_path, None, LoadConfig(device="cpu", dtype="float32", images=False))
    assert text.images == "it was loaded without its vision tower"
    tower = sum(x.nbytes for x in backend.target.tower.arrays)
    assert backend.weights_bytes == text.weights_bytes + tower
