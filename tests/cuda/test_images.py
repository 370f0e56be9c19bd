"""Text after images equals the text of transformers' own `generate`, however it is decoded."""

import inspect
from copy import copy
from dataclasses import replace
from functools import cache, cached_property, partial

import numpy as np
import pytest
import torch
import transformers
import treeflash_cuda.backend as loading
import treeflash_cuda.images as cuda_images
from failures import failing
from image_models import (
    CONFIGS,
    IMAGE,
    RandomProcessor,
    picture,
    random_model,
    reference,
)
from mtp_pairs import write_peagle_head
from parts import load_with_parts
from PIL import Image as Picture
from treeflash_cuda.backend import load

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, families
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.backend_base import BaseState
from treeflash.decoding.disk_cache import DiskCache
from treeflash.decoding.families import FAMILIES, Family, ImageFamily
from treeflash.decoding.image_processor import TOKEN_TYPES, load_processor
from treeflash.decoding.images import PromptImages
from treeflash.decoding.interfaces import ImageProcessor
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.drafters.folder import read_config
from treeflash.errors import PromptError
from treeflash.testing.comparisons import tokens_of
from treeflash.testing.models import edit_config, write_dialect

pytestmark = pytest.mark.sample(1)

CPU = LoadConfig(device="cpu", dtype="float32")
TOKENS, FAULT_TOKENS = 10, 16  # some faults show late
LIMITS = SchedulerConfig(snapshot_interval=4)
TYPES = [name for name in CONFIGS if not name.startswith("gemma4")]  # which takes texts alone
FEW = "qwen3_vl", "qwen3_5", "gemma3"
"""Axes and added features, axes and recurrent layers, images whose tokens see each other."""


def by_day(names):
    """All types, of which the others than these and `FEW` are left to the nightly run."""
    marks = {name: [] if name in (*FEW, *names) else [pytest.mark.nightly] for name in TYPES}
    return [pytest.param(name, marks=marks[name]) for name in TYPES]


PROMPTS = (
    ("ab<image>cd", [picture(1)]),
    ("<image>ef<image>gh", [picture(1), picture(2, 24, 16)]),
    ("ab<image>cd", [picture(3)]),
)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def _random_processors(monkeypatch):
    """Let every folder have the processor of its model's type."""

    def read(folder):
        return RandomProcessor(read_config(folder)["model_type"])

    monkeypatch.setattr(cuda_images, "read_processor", read)


class Pair:
    """A model of transformers, and the same model as a target."""

    def __init__(self, family, folder, patch, loader=load, config=CPU):
        self.model = random_model(family)
        self.model.save_pretrained(folder)
        self.folder = folder
        patch.setattr(cuda_images, "read_processor", lambda _: RandomProcessor(family))
        self.backend = loader(folder, None, config)
        assert not isinstance(self.backend.images, str), self.backend.images
        self.prompts = [self.encode(*prompt) for prompt in PROMPTS]

    def encode(self, text, pictures=()):
        if not pictures:
            return [1, *map(ord, text)], None
        return self.backend.images.encode(text, pictures)

    def reference(self, prompt, tokens=TOKENS):
        return reference(self.model, *prompt, tokens)

    @cached_property
    def expected(self):
        """The tokens after `prompts`."""
        return [self.reference(prompt) for prompt in self.prompts]

    def decode(self, prompts, size=1000, cache=None, method="suffix", tokens=TOKENS, **sampling):
        """The tokens after prompts, decoded together in chunks of a size."""
        config = replace(LIMITS, prefill_chunk=size, lone_prefill_chunk=size)
        scheduler = steady_scheduler(self.backend, config, cache)
        texts = {request(prompt, method, tokens, **sampling): [] for prompt in prompts}
        for one, step in scheduler.decode(texts):
            texts[one] += step.tokens
        return list(texts.values())


def steady_scheduler(backend, config=LIMITS, cache=None):
    """A scheduler that need not time forward passes for its adaptive budget."""
    budgets = AdaptiveBudgets(VerifyCosts({size: 1 + 0.01 * size for size in SIZES}))
    return Scheduler(backend, config, budgets=budgets, prefix_cache=cache)


def request(prompt, method="suffix", tokens=TOKENS, **sampling):
    decode = DecodeConfig(method=method, max_tokens=tokens, sampling=SamplingConfig(**sampling))
    return Request(prompt_ids=prompt[0], images=prompt[1], config=decode)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs by family, each made once."""
    made = {}

    def get(family):
        if family not in made:
            with pytest.MonkeyPatch.context() as patch:
                made[family] = Pair(family, tmp_path_factory.mktemp(family), patch)
        return made[family]

    return get


@pytest.fixture(params=FEW)
def pair(request, pairs):
    return pairs(request.param)


@pytest.mark.parametrize("family", by_day(TYPES[::2]))
def test_text_is_that_of_generate_in_a_batch_with_other_images_and_text(family, pairs):
    pair = pairs(family)
    prompts = [*pair.prompts, pair.encode("abcdabcd")]
    expected = [*pair.expected, pair.reference(prompts[-1])]
    assert len(set(map(tuple, expected))) == len(expected)
    for size in (1000, 5) if family not in FEW else (1000, 5, 1):
        assert pair.decode(prompts, size) == expected
    assert pair.decode(prompts[1:2], 3) == expected[1:2]


@pytest.mark.parametrize("family", by_day(TYPES[::2]))
def test_sampled_text_is_that_of_plain_decoding(family, pairs):
    pair = pairs(family)
    options = {"temperature": 1.0, "seed": 5}
    plain = [pair.decode([prompt], method="ar", **options)[0] for prompt in pair.prompts]
    assert pair.decode(pair.prompts, 5, **options) == plain
    assert plain != pair.decode(pair.prompts)


@pytest.mark.parametrize("family", by_day(TYPES[1::2]))
def test_text_after_a_hit_of_the_prefix_cache(family, pairs):
    pair = pairs(family)
    cache = PrefixCache(1 << 30)
    (answer,) = pair.decode(pair.prompts[:1], cache=cache)
    first = len(pair.prompts[0][0])
    longer = "ab<image>cd" + "".join(map(chr, answer)) + "<image>ij"
    same = pair.encode(longer, [picture(1), picture(4)])
    other = pair.encode(longer, [picture(5), picture(4)])
    without = [*same[0]], None  # placeholders as text
    shared = []
    for prompt in (same, other, without):
        scheduler = steady_scheduler(pair.backend, cache=cache)
        steps = [step for _, step in scheduler.decode([request(prompt)])]
        text = tokens_of(steps)
        if prompt[1] is not None:
            assert text == pair.reference(prompt)
        shared.append(steps[0].cached_tokens)
    assert shared[0] >= first - 1
    image = same[1].images[0].first
    assert 0 < shared[1] <= image
    assert 0 < shared[2] <= image


def restarted(pair, folder, prompts):
    """The tokens after prompts, one after another, and how many of each came from the disk."""
    disk = DiskCache(folder, 1 << 30, b"pair", block=4)
    cache, answers = PrefixCache(1 << 30, disk), []
    for prompt in prompts:
        scheduler = steady_scheduler(pair.backend, cache=cache)
        steps = [step for _, step in scheduler.decode([request(prompt)])]
        answers.append((tokens_of(steps), steps[0].disk_tokens))
    cache.close()
    return answers


@pytest.mark.parametrize("forgets", [False, True])
def test_states_with_pictures_survive_a_restart(pair, forgets, tmp_path, monkeypatch):
    """Another picture finds no state behind it; with keys that forget pictures it would."""
    if forgets:
        monkeypatch.setattr(*ignore_pictures())
    picked = picture(1), picture(3)
    first = pair.encode("ab<image>cdefgh", picked[:1])
    longer = [pair.encode("ab<image>cdefghijkl", [x]) for x in picked]
    ((answer, _),) = restarted(pair, tmp_path, [first])
    assert answer == pair.reference(first)
    ((same, cached),) = restarted(pair, tmp_path, longer[:1])
    assert same == pair.reference(longer[0])
    image = first[1].images[0]
    assert cached > image.end
    ((other, cached),) = restarted(pair, tmp_path, longer[1:])
    assert (other == pair.reference(longer[1])) is not forgets
    assert (cached <= image.first) is not forgets


def test_forks_between_images_and_of_groups(pair):
    cache = PrefixCache(1 << 30)
    one = pair.encode("<image>ef<image>gh", [picture(1), picture(2)])
    two = pair.encode("<image>ef<image>gh", [picture(1), picture(6)])
    assert pair.decode([one], 5, cache) == [pair.reference(one)]
    scheduler = steady_scheduler(pair.backend, cache=cache)
    group = [request(two, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    texts = {one: [] for one in scheduler.submit_group(group)}
    cached = {one: [] for one in group}
    for one, step in scheduler.run():
        texts[one] += step.tokens
        cached[one].append(step.cached_tokens)
    image = two[1].images[1].first
    assert [tokens[0] for tokens in cached.values()][1:] == [len(two[0]) - 1] * 2
    assert 0 < cached[group[0]][0] <= image
    alone = [pair.decode([two], temperature=1.0, seed=seed)[0] for seed in (1, 2, 3)]
    assert list(texts.values()) == alone


def test_a_group_has_equal_images(pair):
    one, two = pair.prompts[0], pair.prompts[2]
    assert one[0] == two[0]
    with pytest.raises(PromptError, match="same prompt"):
        Scheduler(pair.backend).submit_group([request(one), request(two)])


def test_others_go_on_when_an_image_fails_or_its_prompt_is_cancelled(pair, monkeypatch):
    encode, bad = cuda_images.VisionTower.encode, pair.prompts[2][1].images[0]

    def encode_others(tower, image):
        if image is bad:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return encode(tower, image)

    monkeypatch.setattr(cuda_images.VisionTower, "encode", encode_others)
    config = SchedulerConfig(prefill_chunk=5, lone_prefill_chunk=5)
    scheduler = steady_scheduler(pair.backend, config)
    texts = {scheduler.submit(request(prompt)): [] for prompt in pair.prompts}
    scheduler.step()
    cancelled, errors = scheduler.submit(request(pair.prompts[1])), []
    for one, event in scheduler.run():
        scheduler.cancel(cancelled)
        if isinstance(event, Exception):
            errors.append(one)
        else:
            texts[one] += event.tokens
    assert errors == list(texts)[2:]
    assert list(texts.values())[:2] == pair.expected[:2]


def ignore_whole(images, first, size):
    return min(first + size, len(images.is_feature))


def forget_shift():
    return PromptImages, "shift", 0


def cut_inside_images():
    return PromptImages, "chunk_end", ignore_whole


def ignore_pictures():
    return PromptImages, "digests", {}


def take_features_of_the_first_image():
    encode, known = cuda_images.VisionTower.encode, {}

    def first(tower, image):
        return encode(tower, known.setdefault(image.inputs["pixel_values"].shape, image))

    return cuda_images.VisionTower, "encode", first


def take_the_last_prompts_shift():
    """As with `rope_deltas` on the model object."""
    last = []
    begin = BaseState.begin

    def begin_and_note(state, work):
        begin(state, work)
        last[:] = [state.positions.shift, *last] if state.images is not None else last
        state.positions = replace(state.positions, shift=last[0] if last else 0)

    return BaseState, "begin", begin_and_note


def texts_of(pair, prompts):
    """Yield the tokens after prompts, decoded together, and in the other order each alone."""
    decode = partial(pair.decode, size=5, cache=PrefixCache(1 << 30), tokens=FAULT_TOKENS)
    yield decode(prompts)
    yield [decode([prompt])[0] for prompt in prompts[::-1]][::-1]


@pytest.fixture(scope="module")
def sound_prompts(pairs):
    """Prompts of a family, and the tokens after them without a fault."""

    @cache
    def get(family):
        pair = pairs(family)
        pictures = [picture(seed, 8, 48) for seed in (8, 9)]
        prompts = [pair.prompts[1], *(pair.encode("ab<image>cdefgh", [x]) for x in pictures)]
        expected = [pair.reference(prompt, FAULT_TOKENS) for prompt in prompts]
        assert [*texts_of(pair, prompts)] == [expected, expected]
        return prompts, expected

    return get


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("family", "fault", "at_load"),
    [
        ("qwen3_vl", forget_shift, True),
        ("qwen3_5", forget_shift, True),
        ("gemma3", cut_inside_images, True),
        ("gemma3", ignore_pictures, False),
        ("qwen3_vl", take_features_of_the_first_image, True),
        ("qwen3_vl", take_the_last_prompts_shift, False),
    ],
)
def test_planted_faults_change_the_text_or_are_refused_at_load(
    family, fault, at_load, pairs, sound_prompts, monkeypatch
):
    pair, (prompts, expected) = pairs(family), sound_prompts(family)
    monkeypatch.setattr(*fault())
    again = [
        (ids, PromptImages(x.images, x.is_feature, x.positions, x.whole)) for ids, x in prompts
    ]
    found = texts_of(pair, again)
    assert next(found) != expected or next(found) != expected
    if at_load:
        target = pair.backend.target
        old = pair.backend.images
        pair.backend.check_images(target.processor, target.samples)
        assert isinstance(pair.backend.images, str)
        pair.backend.images = old


@pytest.mark.parametrize("family", FEW)
def test_passes_as_on_a_gpu_have_the_same_text(family, tmp_path, monkeypatch):
    """Trees are one pass of fixed shapes, with shifts as inputs; prompts have kernels."""

    def loader(folder, drafter, config):
        return load_with_parts(monkeypatch, folder, drafter, cuda_graphs=True)

    pair = Pair(family, tmp_path, monkeypatch, loader)
    for size in (1000, 5):
        assert pair.decode(pair.prompts, size) == pair.expected


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
def test_exact_mode_is_exact_after_images(family, tmp_path, monkeypatch):
    config = LoadConfig(device="cpu", dtype="bfloat16", exact=True)
    pair = Pair(family, tmp_path, monkeypatch, config=config)
    ids, images = pair.prompts[1]
    tree = DraftTree.from_parents(
        np.array([ids[-1], 70, 71, 72, 73], np.int32), np.array([-1, 0, 1, 0, 3], np.int32)
    )
    seen = []
    for size in (1000, 5, 1):
        with SequenceSession(pair.backend) as session:
            while session.length < len(ids) - 1:
                first = session.length
                end = min(images.chunk_end(first, size), len(ids) - 1)
                session.extend(ids[first:end], images=images)
            seen.append(session.logits(tree))
            for node in (0, 3, 4):
                (alone,) = session.logits(DraftTree.root_only(int(tree.tokens[node])))
                assert (alone == seen[-1][node]).all()
                session.commit(np.zeros(1, np.int32))
    assert (seen[0] == seen[1]).all()
    assert (seen[0] == seen[2]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_text_after_images_with_weights_of_few_bits(bits, tmp_path, monkeypatch):
    """The only few bits of a target with images are those that its weights are rounded to."""
    pytest.importorskip("llvmlite")
    config = LoadConfig(device="cpu", bits=bits)
    pair = Pair("llava", tmp_path, monkeypatch, config=config)
    layers = pair.backend.target.model.modules()
    assert sum(type(layer).__name__ == "LowBitLinear" for layer in layers) > 4
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        plain = [pair.decode([prompt], method="ar", **sampling)[0] for prompt in pair.prompts]
        assert pair.decode(pair.prompts, **sampling) == plain
        assert [pair.decode([prompt], **sampling)[0] for prompt in pair.prompts] == plain


def test_chunks_of_long_prompts_do_not_end_inside_images(pairs, monkeypatch):
    pair = pairs("gemma3")
    for name in ("first_chunk", "next_chunk"):
        monkeypatch.setattr(pair.backend.verifier, name, 5)
    assert pair.decode(pair.prompts) == pair.expected


@pytest.mark.usefixtures("_random_processors")
def test_a_drafter_whose_rows_attend_together_drafts_after_images(pairs, tmp_path):
    pair = copy(pairs("gemma3"))
    write_peagle_head(tmp_path, pair.folder)
    pair.backend = load(pair.folder, tmp_path, CPU)
    assert pair.decode(pair.prompts, 5, method="ddtree") == pair.expected


@pytest.mark.usefixtures("_random_processors")
def test_a_drafter_of_lfm2_drafts_after_images(pairs, tmp_path):
    pair = copy(pairs("lfm2_vl"))
    write_dialect(tmp_path, pair.folder, "deepspec", seed=1)
    settings = {"architectures": ["Lfm2DSparkDraftModel"], "rope_is_neox_style": False}
    edit_config(tmp_path, lambda config: config.update(settings))
    pair.backend = load(pair.folder, tmp_path, CPU)
    assert pair.decode(pair.prompts, 5, method="treeflash") == pair.expected
    assert pair.decode(pair.prompts, method="ddtree") == pair.expected


@pytest.mark.usefixtures("_random_processors")
@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "qwen2_vl"])
def test_without_images_there_is_no_tower_and_text_is_the_same(family, pairs):
    pair = pairs(family)
    text = load(pair.folder, None, LoadConfig(device="cpu", dtype="float32", images=False))
    assert text.images == "it was loaded without its vision tower"
    names = [name for name, _ in text.target.model.named_parameters()]
    assert not [name for name in names if "vis" in name or "multi_modal" in name]
    tower = sum(x.nbytes for x in pair.backend.target.tower.parameters)
    assert pair.backend.weights_bytes == text.weights_bytes + tower
    prompt = pair.encode("abcdabcd")
    tokens = [
        t for _, step in steady_scheduler(text).decode([request(prompt)]) for t in step.tokens
    ]
    assert tokens == pair.reference(prompt)
    with pytest.raises(PromptError, match="takes no images: it was loaded without its vision"):
        Scheduler(text).submit(request(pair.prompts[0]))


def test_a_folder_without_a_processor_is_a_text_model(pairs):
    pair = pairs("qwen3_vl")
    text = load(pair.folder, None, CPU)
    assert text.images.startswith("its folder has no usable processor")
    prompt = pair.encode("abcdabcd")
    tokens = [
        t for _, step in steady_scheduler(text).decode([request(prompt)]) for t in step.tokens
    ]
    assert tokens == pair.reference(prompt)


def test_types_that_are_not_known_to_be_exact_are_refused_by_name(tmp_path):
    for name in ("paligemma", "mllama", "llama4"):
        config = transformers.CONFIG_MAPPING[name]()
        reason = load_processor(tmp_path, config.to_dict(), "cuda", cuda_images.read_processor)
        assert reason == FAMILIES[name].images if name in FAMILIES else "not known" in reason
    llama = transformers.LlamaConfig().to_dict()
    assert load_processor(tmp_path, llama, "cuda", cuda_images.read_processor) == (
        "it has no vision tower"
    )


@pytest.mark.usefixtures("_random_processors")
def test_a_model_that_fails_on_images_remains_a_text_model(tmp_path):
    import treeflash_cuda.hf.model_target as target

    random_model("qwen3_vl").save_pretrained(tmp_path)
    with failing(target, "run_samples", RuntimeError("no kernel for this tower")):
        backend = load(tmp_path, None, CPU)
    assert backend.images == "transformers cannot run an image (no kernel for this tower)"
    assert backend.target.tower is None


def test_placeholders_that_have_no_picture_are_refused(pairs):
    processor: ImageProcessor = pairs("qwen3_vl").backend.images
    for text in ("ab", "<image><image>"):
        with pytest.raises(PromptError, match="for 1 images"):
            processor.encode(text, [picture(1)])
    with pytest.raises(PromptError, match="placeholders for 6 features"):
        processor.encode("<image>" + chr(300), [picture(1, 8, 48)])


def test_a_prompt_with_images_is_not_scored(pairs):
    pair = pairs("qwen3_vl")
    ids, images = pair.prompts[0]
    scored = Request(
        prompt_ids=ids, images=images, config=DecodeConfig(method="ar"), scores_prompt=True
    )
    with pytest.raises(PromptError, match="cannot be scored"):
        Scheduler(pair.backend).submit(scored)


def test_exact_mode_on_a_gpu_refuses_images_that_need_a_mask(tmp_path, monkeypatch):
    def loader(folder, drafter, config):
        return load_with_parts(monkeypatch, folder, drafter)

    target = Pair("gemma3", tmp_path, monkeypatch, loader).backend.target
    monkeypatch.setattr(loading.CudaBackend, "check_exact", lambda _: None)
    target.is_exact = True
    with pytest.warns(match="the target takes no images"):
        backend = loading.add_drafter(target, None, CPU)
    assert backend.images == "exact mode on a GPU does not run images whose tokens see each other"
    assert target.tower is None


@pytest.mark.parametrize("family", by_day(TYPES[::2]))
def test_text_of_a_model_of_transformers_is_that_of_its_own_generate(family):
    """In padded batches with texts."""
    from treeflash.transformers import enable

    model, processor = random_model(family), RandomProcessor(family)
    texts = [("ab<image>cd", [picture(1)]), ("efgh<image>ij", [picture(2)])]
    made = [processor([text], [Picture.fromarray(x) for x in images]) for text, images in texts]
    rows = [[*x["input_ids"][0]] for x in made] + [[1, *map(ord, "abcdabcd")]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    names = [name for name in made[0] if name not in ("input_ids", "attention_mask")]
    inputs = {x: torch.cat([torch.from_numpy(one[x]) for one in made]) for x in names}
    parameters = inspect.signature(type(model).forward).parameters
    inputs |= {x: (ids == IMAGE).int() for x in TOKEN_TYPES if x in parameters}

    def generate():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            **inputs,
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).tolist()

    expected = generate()
    enable(model, drafter=False)
    assert generate() == expected
    assert len({*map(tuple, expected)}) == 3
    ids, mask = ids[2:, -9:], mask[2:, -9:]  # the text alone, which processors say of each token
    inputs = {x: torch.zeros_like(ids) for x in TOKEN_TYPES if x in parameters}
    assert generate() == [expected[2][-9 - TOKENS :]]


def test_other_features_than_placeholders_are_refused():
    from treeflash.errors import ConfigError
    from treeflash.transformers import enable

    model = random_model("llava")
    made = RandomProcessor("llava")(["ab<image>cd"], [Picture.fromarray(picture(1))])
    inputs = {name: torch.from_numpy(x) for name, x in made.items()}
    place = inputs["input_ids"][0].tolist().index(IMAGE)
    for name in ("input_ids", "attention_mask"):  # as if the prompt had been cut
        x = inputs[name]
        inputs[name] = torch.cat([x[:, :place], x[:, place + 1 :]], 1)
    enable(model, drafter=False)
    with pytest.raises(ConfigError, match=r"^15 placeholders for 16 features of images$"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("known", [{}, {"qwen3_vl": Family(images=ImageFamily(backends=["mlx"]))}])
def test_images_of_unknown_models_of_transformers_are_refused(pairs, monkeypatch, known):
    """Unknown are types without a record, and ones that another backend alone runs."""
    from treeflash.errors import ConfigError
    from treeflash.transformers import disable, generate

    model, (ids, images) = pairs("qwen3_vl").model, pairs("qwen3_vl").prompts[0]
    monkeypatch.setattr(families, "FAMILIES", known)
    with pytest.raises(ConfigError, match="does not support images of this model type"):
        model.generate(
            input_ids=torch.tensor([ids]),
            **{name: torch.from_numpy(x) for name, x in images.images[0].inputs.items()},
            max_new_tokens=2,
            custom_generate=generate,
            drafter=False,
            method="ar",
        )
    disable(model)
