"""Text after images equals the text of transformers' own `generate`, however it is decoded."""

import importlib
from contextlib import closing
from copy import copy
from dataclasses import replace
from functools import partial

import pytest
from stand_ins import stand_in

pytest.importorskip("torch")

import transformers
from engines import each
from failures import failing
from image_models import CONFIGS, Vision, picture, request, steady_scheduler
from mtp_pairs import write_peagle_head

from treeflash.decoding import Scheduler, SchedulerConfig
from treeflash.decoding.backend_base import BaseState
from treeflash.decoding.disk_cache import DiskCache
from treeflash.decoding.families import FAMILIES
from treeflash.decoding.image_processor import load_processor
from treeflash.decoding.images import PromptImages
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.errors import PromptError
from treeflash.testing.comparisons import tokens_of
from treeflash.testing.models import edit_config, write_dialect

FAULT_TOKENS = 16  # some faults show late
FEW = "qwen3_vl", "qwen3_5", "gemma3"
"""Axes and added features, axes and recurrent layers, images whose tokens see each other."""
OF_PYTORCH = [*FEW, *(x for x in CONFIGS if x not in FEW and not x.startswith("gemma4"))]
OF_MLX = [
    *FEW,
    "gemma4",
    "gemma4 small",
    "qwen2_vl",
    "qwen2_5_vl",
    "lfm2_vl",
    "mistral3",
    "pixtral",
]
each_family = each(("family",), cuda=OF_PYTORCH, mlx=OF_MLX)
few_families = each(("family",), cuda=FEW, mlx=FEW)
one_family = each(("family",), cuda=FEW[:1], mlx=FEW[:1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models by engine and family, each made once."""
    transformers.logging.set_verbosity_error()
    made = {}

    def get(engine, family):
        if (engine, family) not in made:
            made[engine, family] = Vision(engine, family, tmp_path_factory.mktemp("vision"))
        return made[engine, family]

    return get


@pytest.fixture
def vision(engine, family, models):
    if engine.__name__ == "engines.mlx":  # whose towers are in a package of their own
        pytest.importorskip("mlx_vlm")
    return models(engine, family)


@pytest.mark.sample(4)
@each_family
def test_text_is_that_of_generate_in_a_batch_with_other_images_and_text(vision):
    prompts = [*vision.prompts, vision.encode("abcdabcd")]
    expected = [*vision.expected, vision.reference(prompts[-1])]
    assert len(set(map(tuple, expected))) == len(expected)
    for size in (1000, 5):
        assert vision.decode(prompts, size) == expected
    assert vision.decode(prompts[1:2], 1) == expected[1:2]


@pytest.mark.sample(2)
@each_family
def test_sampled_text_is_that_of_plain_decoding(vision):
    options = {"temperature": 1.0, "seed": 5}
    plain = [vision.decode([x], method="ar", **options)[0] for x in vision.prompts]
    assert vision.decode(vision.prompts, 5, **options) == plain
    assert plain != vision.decode(vision.prompts)


@pytest.mark.sample(2)
@each_family
def test_text_after_a_hit_of_the_prefix_cache(vision):
    cache = PrefixCache(1 << 30)
    (answer,) = vision.decode(vision.prompts[:1], cache=cache)
    first = len(vision.prompts[0][0])
    longer = "ab<image>cd" + "".join(map(chr, answer)) + "<image>ij"
    same = vision.encode(longer, [picture(1), picture(4)])
    other = vision.encode(longer, [picture(5), picture(4)])
    without = [*same[0]], None  # placeholders as text
    shared = []
    for prompt in (same, other, without):
        steps = vision.decode_alone(prompt, cache)
        if prompt[1] is not None:
            assert tokens_of(steps) == vision.reference(prompt)
        shared.append(steps[0].cached_tokens)
    assert shared[0] >= first - 1
    image = same[1].images[0].first
    assert 0 < shared[1] <= image
    assert 0 < shared[2] <= image


@pytest.mark.sample(2)
@pytest.mark.parametrize("forgets", [False, True])
@few_families
def test_states_with_pictures_survive_a_restart(vision, forgets, tmp_path, monkeypatch):
    """Another picture finds no state behind it; with keys that forget pictures it would."""
    if forgets:
        monkeypatch.setattr(*ignore_pictures(vision.engine))
    first, same, other = (
        vision.encode(f"ab<image>cdefgh{end}", [picture(seed)])
        for end, seed in (("", 1), ("ijkl", 1), ("ijkl", 3))
    )
    disk_tokens = []
    for prompt in (first, same, other):  # each in a process of its own
        disk = DiskCache(tmp_path, 1 << 30, b"pair", block=4)
        with closing(PrefixCache(1 << 30, disk)) as cache:
            steps = vision.decode_alone(prompt, cache)
        disk_tokens.append(steps[0].disk_tokens)
        wrong = forgets and prompt is other
        assert (tokens_of(steps) == vision.reference(prompt)) is not wrong
    image = first[1].images[0]
    assert disk_tokens[1] > image.end
    assert (disk_tokens[2] <= image.first) is not forgets


@pytest.mark.sample(2)
@few_families
def test_forks_between_images_and_of_groups(vision):
    cache = PrefixCache(1 << 30)
    one, two = (vision.encode("<image>ef<image>gh", [picture(1), picture(n)]) for n in (2, 6))
    assert vision.decode([one], 5, cache) == [vision.reference(one)]
    scheduler = steady_scheduler(vision.backend, cache=cache)
    group = [request(two, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    texts = {one: [] for one in scheduler.submit_group(group)}
    cached = {one: [] for one in group}
    for one, step in scheduler.run():
        texts[one] += step.tokens
        cached[one].append(step.cached_tokens)
    first, *others = [tokens[0] for tokens in cached.values()]
    assert others == [len(two[0]) - 1] * 2
    assert 0 < first <= two[1].images[1].first
    alone = [vision.decode([two], temperature=1.0, seed=seed)[0] for seed in (1, 2, 3)]
    assert list(texts.values()) == alone


@pytest.mark.sample(2)
@few_families
def test_others_go_on_when_an_image_fails_or_its_prompt_is_cancelled(vision, monkeypatch):
    tower, bad = vision.engine.images.VisionTower, vision.prompts[2][1].images[0]
    encode = tower.encode

    def encode_others(self, *args):
        if args[-1] is bad:
            raise RuntimeError("out of memory")
        return encode(self, *args)

    stand_in(monkeypatch, tower, encode=encode_others)
    config = SchedulerConfig(prefill_chunk=5, lone_prefill_chunk=5)
    scheduler = steady_scheduler(vision.backend, config)
    texts = {scheduler.submit(request(prompt)): [] for prompt in vision.prompts}
    scheduler.step()
    cancelled, errors = scheduler.submit(request(vision.prompts[1])), []
    for one, event in scheduler.run():
        scheduler.cancel(cancelled)
        if isinstance(event, Exception):
            errors.append(one)
        else:
            texts[one] += event.tokens
    assert errors == list(texts)[2:]
    assert list(texts.values())[:2] == vision.expected[:2]


@each(("family",), cuda=["gemma3"], mlx=["gemma3"])
def test_chunks_of_long_prompts_do_not_end_inside_images(vision):
    vision.engine.set_chunks(vision.backend, 5)
    assert vision.decode(vision.prompts) == vision.expected


def write_lfm2_drafter(folder, target):
    write_dialect(folder, target, "deepspec", seed=1)
    settings = {"architectures": ["Lfm2DSparkDraftModel"], "rope_is_neox_style": False}
    edit_config(folder, lambda config: config.update(settings))


DRAFTERS = [
    ("gemma3", write_peagle_head, ["ddtree"]),
    ("lfm2_vl", write_lfm2_drafter, ["treeflash", "ddtree"]),
]
"""Rows that attend together, and rotated pairs of neighbours."""


@each(("family", "write", "methods"), cuda=DRAFTERS, mlx=DRAFTERS)
def test_drafters_draft_after_images(vision, tmp_path, write, methods):
    write(tmp_path, vision.folder)
    drafting = copy(vision)
    drafting.backend = vision.load(tmp_path)
    for method in methods:
        assert drafting.decode(vision.prompts, 5, method=method) == vision.expected


def forget_shift(engine):
    return PromptImages, "shift", 0


def cut_inside_images(engine):
    return PromptImages, "chunk_end", lambda images, n, size: min(n + size, len(images.is_feature))


def ignore_pictures(engine):
    return PromptImages, "digests", {}


def take_features_of_the_first_image(engine):
    encode, known = engine.images.VisionTower.encode, {}

    def first(tower, *args):
        *others, image = args
        return encode(tower, *others, known.setdefault(image.inputs["pixel_values"].shape, image))

    return engine.images.VisionTower, "encode", first


def take_the_last_prompts_shift(engine):
    """As with `rope_deltas` on the model object."""
    last = []
    begin = BaseState.begin

    def begin_and_note(state, work):
        begin(state, work)
        last[:] = [state.positions.shift, *last] if state.images is not None else last
        state.positions = replace(state.positions, shift=last[0] if last else 0)

    return BaseState, "begin", begin_and_note


def texts_of(vision, prompts):
    """Yield the tokens after prompts, decoded together, and in the other order each alone."""
    decode = partial(vision.decode, size=5, cache=PrefixCache(1 << 30), tokens=FAULT_TOKENS)
    yield decode(prompts)
    yield [decode([prompt])[0] for prompt in prompts[::-1]][::-1]


@pytest.fixture(scope="module")
def sound_texts():
    """Prompts, and the tokens after them without a fault, each made once."""
    made = {}

    def get(vision):
        if vision not in made:
            texts = [vision.encode("ab<image>cdefgh", [picture(n, 8, 48)]) for n in (8, 9)]
            prompts = [vision.prompts[1], *texts]
            expected = [vision.reference(prompt, FAULT_TOKENS) for prompt in prompts]
            assert [*texts_of(vision, prompts)] == [expected, expected]
            made[vision] = prompts, expected
        return made[vision]

    return get


FAULTS = [
    *(("qwen3_vl", forget_shift, True), ("qwen3_5", forget_shift, True)),
    *(("gemma3", cut_inside_images, True), ("gemma3", ignore_pictures, False)),
    ("qwen3_vl", take_features_of_the_first_image, True),
    ("qwen3_vl", take_the_last_prompts_shift, False),
]


@each(("family", "fault", "at_load"), cuda=FAULTS, mlx=[FAULTS[0], FAULTS[3], FAULTS[5]])
def test_planted_faults_change_the_text_or_are_refused_at_load(
    vision, fault, at_load, sound_texts, monkeypatch
):
    prompts, expected = sound_texts(vision)
    monkeypatch.setattr(*fault(vision.engine))
    again = [
        (ids, PromptImages(x.images, x.is_feature, x.positions, x.whole)) for ids, x in prompts
    ]
    found = texts_of(vision, again)
    assert next(found) != expected or next(found) != expected
    if at_load:
        backend, processor = vision.backend, vision.backend.images
        backend.check_images(processor, vision.engine.image_samples(backend))
        refusal, backend.images = backend.images, processor
        assert isinstance(refusal, str)


@pytest.mark.sample(2)
@each(("family",), cuda=["gemma3", "qwen3_5", "qwen2_vl"], mlx=["qwen2_vl", *FEW])
def test_without_images_there_is_no_tower_and_text_is_the_same(vision):
    text = vision.load(images=False)
    assert text.images == "it was loaded without its vision tower"
    assert text.target.tower is None
    tower = vision.engine.tower_nbytes(vision.backend)
    norms = vision.engine.repeated_norms_nbytes(text)
    assert vision.backend.weights_bytes + norms == text.weights_bytes + tower
    prompt = vision.encode("abcdabcd")
    steps = steady_scheduler(text).decode([request(prompt)])
    assert [token for _, step in steps for token in step.tokens] == vision.reference(prompt)
    with pytest.raises(PromptError, match="takes no images: it was loaded without its vision"):
        Scheduler(text).submit(request(vision.prompts[0]))


@one_family
def test_a_folder_without_a_processor_is_a_text_model(vision):
    text = vision.engine.load(vision.folder)
    assert text.images.startswith("its folder has no usable processor")
    steps = steady_scheduler(text).decode([request(vision.encode("abcdabcd"))])
    expected = vision.reference(vision.encode("abcdabcd"))
    assert [token for _, step in steps for token in step.tokens] == expected


@each(
    ("family", "module", "function", "reason"),
    cuda=[
        (
            *("qwen3_vl", "treeflash_cuda.hf.model_target", "run_samples"),
            "transformers cannot run an image (no such kernel)",
        )
    ],
    mlx=[
        (
            *("qwen3_vl", "treeflash_mlx.target", "load_tower"),
            "mlx-vlm cannot load its vision tower (no such kernel)",
        )
    ],
)
def test_a_model_that_fails_on_images_remains_a_text_model(vision, module, function, reason):
    error = ValueError("no such kernel\nin this place")
    with failing(importlib.import_module(module), function, error):
        backend = vision.load()
    assert (backend.images, backend.target.tower) == (reason, None)


@one_family
def test_a_target_whose_text_is_wrong_after_images_takes_none(vision, monkeypatch, recwarn, caplog):
    """One line says so, and the tower takes no memory."""
    stand_in(monkeypatch, PromptImages, shift=0)
    backend = vision.load()
    assert (backend.target.tower, type(backend.images)) == (None, str)
    lines = caplog.messages + [str(x.message) for x in recwarn]
    assert lines == [f"{backend.images}; the target takes no images"]


def test_types_that_are_not_known_to_be_exact_are_refused_by_name(engine, tmp_path):
    def refusal(config):
        name = engine.__name__.rpartition(".")[2]
        return load_processor(tmp_path, config.to_dict(), name, engine.images.read_processor)

    for name in ("paligemma", "mllama", "llama4"):
        reason = refusal(transformers.CONFIG_MAPPING[name]())
        assert reason == FAMILIES[name].images if name in FAMILIES else "not known" in reason
    assert refusal(transformers.LlamaConfig()) == "it has no vision tower"


@each(("family",), cuda=FEW[:1])
def test_prompts_that_do_not_fit_their_images_are_refused(vision):
    for text in ("ab", "<image><image>"):
        with pytest.raises(PromptError, match="for 1 images"):
            vision.backend.images.encode(text, [picture(1)])
    with pytest.raises(PromptError, match="placeholders for 6 features"):
        vision.backend.images.encode("<image>" + chr(300), [picture(1, 8, 48)])
    one, two = vision.prompts[0], vision.prompts[2]
    assert one[0] == two[0]
    with pytest.raises(PromptError, match="same prompt"):
        Scheduler(vision.backend).submit_group([request(one), request(two)])
    with pytest.raises(PromptError, match="cannot be scored"):
        Scheduler(vision.backend).submit(replace(request(one, method="ar"), scores_prompt=True))
