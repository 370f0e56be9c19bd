"""Images in prompts: positions, chunks, and which states other prompts may share."""

from types import SimpleNamespace

import numpy as np
import pytest
from fake_models import FakeState
from hypothesis import given
from hypothesis import strategies as st

from treeflash.decoding.backend_base import BaseState
from treeflash.decoding.disk_cache import Prefix
from treeflash.decoding.families import ImageFamily
from treeflash.decoding.image_processor import KEPT_PICTURES, Processor, load_processor
from treeflash.decoding.images import Image, PrefillImages, PromptImages, locate, rotary_positions
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.state_files import PrefixKeys
from treeflash.decoding.suffix import SEPARATOR, SuffixDrafter
from treeflash.decoding.tree import DraftTree

PLACEHOLDER = 9


def pixels(seed, height=6, width=4):
    values = np.random.default_rng(seed).standard_normal((height * width, 3)).astype(np.float32)
    return {"pixel_values": values, "image_grid_thw": np.array([[1, height, width]])}


def prompt(*parts, whole=False):
    """Return ids and images of a prompt of texts (lists of ids) and images (inputs, features)."""
    ids, inputs = [], []
    for part in parts:
        if isinstance(part, list):
            ids += part
        else:
            inputs.append(part)
            ids += [PLACEHOLDER] * part[1]
    images, is_feature = locate(ids, PLACEHOLDER, inputs)
    return ids, PromptImages(images, is_feature, whole=whole)


def test_next_tokens_stand_for_features_and_nodes_of_trees_do_not():
    ids, images = prompt([1, 2], (pixels(0), 6), [3])
    state = SimpleNamespace(images=PrefillImages(images), length=1)
    nodes = DraftTree.chain(np.array(ids[1:3], np.int32))
    found = [BaseState.has_features(state, tokens) for tokens in (ids[1:3], ids[1:2], nodes)]
    assert found == [True, False, False]


def test_positions_of_text_follow_the_largest_position_of_an_image():
    _, images = prompt([1, 1, 1], (pixels(0, 4, 6), 6), [2, 2])
    positions = rotary_positions(images.is_feature, [(1, 4, 6)], 2)
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert PromptImages(images.images, images.is_feature, positions).shift == -3
    assert images.shift == 0  # positions are columns


def test_tokens_between_the_features_of_an_image_are_its_own():
    ids = [1, 9, 9, 5, 9, 9, 1, 9, 1]
    images, is_feature = locate(ids, PLACEHOLDER, [({}, 4), ({}, 1)])
    assert [(x.first, x.end) for x in images] == [(1, 6), (7, 8)]
    assert is_feature.tolist() == [x == 9 for x in ids]


@pytest.mark.parametrize("counts", [(4,), (4, 2), ()])
def test_placeholders_that_no_image_has_are_an_error(counts):
    with pytest.raises(ValueError, match="5 placeholders for"):
        locate([1, 9, 9, 5, 9, 9, 1, 9, 1], PLACEHOLDER, [({}, count) for count in counts])


def test_chunks_end_anywhere_but_inside_whole_images():
    parts = [1, 1], (pixels(0), 4), (pixels(1), 2), [2, 2, 2]  # images at 2 .. 5 and 6 .. 7
    _, images = prompt(*parts)
    assert [images.chunk_end(2, size) for size in (1, 3, 100)] == [3, 5, 11]
    _, whole = prompt(*parts, whole=True)
    ends = {(0, 1): 1, (0, 3): 2, (0, 6): 6, (0, 7): 6, (2, 1): 6, (2, 5): 6, (2, 6): 8}
    assert {key: whole.chunk_end(*key) for key in ends} == ends
    assert whole.chunk_end(3, 1) == 6  # from inside an image, of which a cache has the beginning
    assert whole.chunk_end(8, 100) == 11


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12), st.booleans())
def test_chunks_cover_a_prompt_and_hold_whole_images(counts, size, text):
    parts = []
    for seed, count in enumerate(counts):
        parts += [[1] * text, (pixels(seed), count)]
    ids, images = prompt(*parts, [2], whole=True)
    first = 0
    while first < len(ids):
        end = images.chunk_end(first, size)
        assert first < end <= len(ids)
        assert not any(x.first < end < x.end for x in images.images)
        first = end


def test_digests_know_shapes_names_and_dtypes():
    values = np.arange(24, dtype=np.float32)
    given_inputs = [
        {"pixel_values": values.reshape(6, 4)},
        {"pixel_values": values.reshape(4, 6)},
        {"pixels": values.reshape(6, 4)},
        {"pixel_values": values.reshape(6, 4).view(np.int32)},
        {"pixel_values": values.reshape(6, 4), "grid": np.array([1])},
    ]
    digests = [Image(0, 1, inputs).digest for inputs in given_inputs]
    assert len(set(digests)) == len(digests)
    columns = np.asfortranarray(values.reshape(6, 4))
    assert Image(5, 9, {"pixel_values": columns}).digest == digests[0]


def seen(ids, digests, length):
    """Return what the positions of a state depend on."""
    return ids[:length], {first: x for first, x in digests.items() if first < length}


PARTS = st.lists(
    st.one_of(st.integers(1, 3).map(lambda x: [x]), st.tuples(st.integers(0, 2), st.just(2))),
    min_size=1,
    max_size=6,
)


@given(st.lists(PARTS, min_size=2, max_size=6), st.integers(1, 3))
def test_no_state_that_is_found_has_seen_another_image(prompts, block):
    cache, keys, kept, longest = PrefixCache(100), {}, {}, 0
    made = [
        prompt(*([x if isinstance(x, list) else (pixels(x[0]), x[1]) for x in parts]))
        for parts in prompts
    ]
    for ids, images in made[:-1]:
        state = FakeState(None, drafts=False, tokens=ids)
        kept[state] = ids, images.digests
        cache.put(Prefix("pair", ids, images.digests), state)
    ids, images = made[-1]
    found = cache.find(Prefix("pair", ids, images.digests))
    for other, its_images in made[:-1]:
        shared = max(
            n
            for n in range(min(len(ids), len(other)) + 1)
            if seen(ids, images.digests, n) == seen(other, its_images.digests, n)
        )
        longest = max(longest, shared)
    if found is None:
        assert longest == 0
    else:
        state, length = found
        assert length == longest
        assert seen(ids, images.digests, length) == seen(*kept[state], length)
    # Keys of files are equal exactly where states are.
    for ids, images in made:
        of_prompt = PrefixKeys(b"root", ids, block, images.digests)
        for length in range(1, len(ids) + 1):
            sight = repr(seen(ids, images.digests, length))
            assert keys.setdefault(of_prompt[length], sight) == sight
    assert len(keys) == len(set(keys.values()))


def test_placeholders_are_never_copied():
    ids, images = prompt([1, 2, 3], (pixels(0), 3), [4, 1, 2, 3])
    copying = SuffixDrafter(ids)
    assert copying.propose(8, 8).tokens[1] == PLACEHOLDER  # as in a text without images
    text = images.as_text(ids)
    assert text == [1, 2, 3, SEPARATOR, SEPARATOR, SEPARATOR, 4, 1, 2, 3]
    proposal = SuffixDrafter(text).propose(8, 8)
    assert len(proposal) == 1


class TwoFeatures:
    """Like a processor of transformers, for images of two features; counts its calls."""

    image_token, calls = "x", 0
    tokenizer = SimpleNamespace(bos_token=None)

    def __call__(self, text, images, **options):
        self.calls += 1
        ids = [PLACEHOLDER if letter == "x" else 1 for letter in text[0].replace("x", "xx")]
        return {"input_ids": [ids], "pixel_values": np.stack(images)}


def test_the_latest_pictures_are_prepared_once():
    """A chat sends its pictures with every turn."""
    read = TwoFeatures()
    processor = Processor(read, ImageFamily(), PLACEHOLDER, 2)
    pictures = [np.full((1, 1, 3), n, np.uint8) for n in range(KEPT_PICTURES + 1)]

    def calls(*numbers):
        before = read.calls
        processor.encode("a" + "x" * len(numbers), [pictures[n] for n in numbers])
        return read.calls - before

    assert calls(0, 1) == 3  # one is for the prompt
    assert [calls(n) for n in range(2, KEPT_PICTURES)] == [2] * (KEPT_PICTURES - 2)
    assert calls(0, KEPT_PICTURES) == 2
    assert [calls(n) for n in (0, KEPT_PICTURES, 1)] == [1, 1, 2]


def no_processor(folder):
    return object()


def needs_a_package(folder):
    raise ImportError("it needs torchvision\nor something else")


@pytest.mark.parametrize(
    ("config", "read", "reason"),
    [
        ({}, no_processor, "its configuration does not say which token stands for an image"),
        (
            {"image_token_id": PLACEHOLDER},
            no_processor,
            "its folder has no usable processor ('object' object",
        ),
        (
            {"image_token_id": PLACEHOLDER},
            needs_a_package,
            "its processor needs a package that is not installed (it needs torchvision); pip "
            "install '.[mlx-images]'",
        ),
    ],
)
def test_a_folder_that_lacks_what_images_need_is_a_text_model(tmp_path, config, read, reason):
    """A tokenizer may be all that a folder has in place of a processor."""
    config = {"model_type": "qwen2_vl", "vision_config": {}, **config}
    found = load_processor(tmp_path, config, "mlx", read)
    assert isinstance(found, str)
    assert found.startswith(reason)
