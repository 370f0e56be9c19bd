"""Images where the PyTorch backend has ways of its own; `tests/engines` has the others."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
import transformers
import treeflash_cuda.backend as loading
from engines import cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from image_models import (
    CONFIGS,
    IMAGE,
    PROCESSORS,
    TOKENS,
    RandomProcessor,
    Vision,
    picture,
    random_model,
)
from parts import load_with_parts
from PIL import Image as Picture
from stand_ins import stand_in
from transformers import MODEL_MAPPING, AutoConfig
from treeflash_cuda.backend import load
from treeflash_cuda.images import read_processor

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler, families
from treeflash.decoding.families import FAMILIES, Family, ImageFamily
from treeflash.decoding.image_processor import TOKEN_TYPES, Processor, load_processor
from treeflash.decoding.images import rotary_positions
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config
from treeflash.errors import ConfigError, PromptError
from treeflash.testing.pairs import EXAMPLES, repeated
from treeflash.transformers import enable, generate

FEW = "qwen3_vl", "qwen3_5", "gemma3"
"""Axes and added features, axes and recurrent layers, images whose tokens see each other."""
TYPES = [*FEW, *(x for x in CONFIGS if x not in FEW and not x.startswith("gemma4"))]


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", FEW)
def test_passes_as_on_a_gpu_have_the_same_text(family, tmp_path, monkeypatch):
    """Trees are one pass of fixed shapes, with shifts as inputs; prompts have kernels."""
    load_passes = partial(load_with_parts, monkeypatch)
    pair = Vision(cuda, family, tmp_path, load=load_passes, cuda_graphs=True)
    for size in (1000, 5):
        assert pair.decode(pair.prompts, size) == pair.expected


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
def test_exact_mode_is_exact_after_images(family, tmp_path):
    pair = Vision(cuda, family, tmp_path, dtype="bfloat16", exact=True)
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


@pytest.mark.sample(1)
@pytest.mark.parametrize("bits", [4, 8])
def test_text_after_images_with_weights_of_few_bits(bits, tmp_path):
    """The only few bits of a target with images are those that its weights are rounded to."""
    pytest.importorskip("llvmlite")
    pair = Vision(cuda, "llava", tmp_path, dtype=None, bits=bits)
    layers = pair.backend.target.model.modules()
    assert sum(type(layer).__name__ == "LowBitLinear" for layer in layers) > 4
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        plain = [pair.decode([prompt], method="ar", **sampling)[0] for prompt in pair.prompts]
        assert pair.decode(pair.prompts, **sampling) == plain
        assert [pair.decode([prompt], **sampling)[0] for prompt in pair.prompts] == plain


def test_exact_mode_on_a_gpu_refuses_images_that_need_a_mask(tmp_path, monkeypatch):
    vision = Vision(cuda, "gemma3", tmp_path, load=partial(load_with_parts, monkeypatch))
    target = vision.backend.target
    stand_in(monkeypatch, loading.CudaBackend, check_exact=lambda _: None)
    target.is_exact = True
    with pytest.warns(match="the target takes no images"):
        backend = loading.add_drafter(target, None, LoadConfig(device="cpu", dtype="float32"))
    assert backend.images == "exact mode on a GPU does not run images whose tokens see each other"
    assert target.tower is None


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", TYPES)
def test_text_of_a_model_of_transformers_is_that_of_its_own_generate(family):
    """In padded batches with texts."""
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

    def generated():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            **inputs,
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).tolist()

    expected = generated()
    enable(model, drafter=False)
    assert generated() == expected
    assert len({*map(tuple, expected)}) == 3
    ids, mask = ids[2:, -9:], mask[2:, -9:]  # the text alone, which processors say of each token
    inputs = {x: torch.zeros_like(ids) for x in TOKEN_TYPES if x in parameters}
    assert generated() == [expected[2][-9 - TOKENS :]]


def test_other_features_than_placeholders_are_refused():
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
def test_images_of_unknown_models_of_transformers_are_refused(monkeypatch, known):
    """Unknown are types without a record, and ones that another backend alone runs."""
    model = random_model("qwen3_vl")
    made = RandomProcessor("qwen3_vl")(["ab<image>cd"], [Picture.fromarray(picture(1))])
    stand_in(monkeypatch, families, FAMILIES=known)
    with pytest.raises(ConfigError, match="does not support images of this model type"):
        model.generate(
            **{name: torch.from_numpy(x) for name, x in made.items()},
            max_new_tokens=2,
            custom_generate=generate,
            drafter=False,
            method="ar",
        )


PICTURES = [picture(1, 40, 56), picture(2, 64, 32)]


@pytest.fixture(params=[x for x in PROCESSORS if "cuda" in FAMILIES[x].images.backends])
def folder(request, tmp_path):
    pytest.importorskip("torchvision")
    CONFIGS[request.param]().save_pretrained(tmp_path)
    PROCESSORS[request.param]().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.sample(4)
def test_ids_and_inputs_are_those_of_one_call(folder):
    processor = load_processor(folder, read_config(folder), "cuda", read_processor)
    assert isinstance(processor, Processor), processor
    text = f"ab{processor.placeholder}cd{processor.placeholder}ef"
    ids, images = processor.encode(text, PICTURES)
    pictures = [Picture.fromarray(x) for x in PICTURES]
    own = transformers.AutoProcessor.from_pretrained(folder)
    whole = own(text=[text], images=pictures, return_tensors="pt")
    assert whole["input_ids"][0].tolist() == ids
    assert (images.is_feature == (np.array(ids) == 300)).all()
    for name in images.images[0].inputs:
        arrays = [image.inputs[name] for image in images.images]
        if all(x.shape[1:] == whole[name].shape[1:] for x in arrays):  # else they are padded
            assert (np.concatenate(arrays) == whole[name].numpy()).all()
    again, same = processor.encode(text, PICTURES)
    assert (again, same.digests) == (ids, images.digests)
    with pytest.raises(PromptError, match="for 2 images"):
        processor.encode(f"ab{processor.placeholder}", PICTURES)


@pytest.mark.sample(1)
@pytest.mark.parametrize("folder", ["qwen3_5", "gemma3", "lfm2_vl"], indirect=True)
def test_text_is_that_of_generate_with_the_processors_inputs(folder):
    family = transformers.AutoConfig.from_pretrained(folder).model_type
    model = random_model(family)
    model.save_pretrained(folder)
    backend = load(folder, None, LoadConfig(device="cpu", dtype="float32"))
    assert not isinstance(backend.images, str), backend.images
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = f"ab{processor.image_token}cd{processor.image_token}ef"
    inputs = processor(
        text=[text], images=[Picture.fromarray(x) for x in PICTURES], return_tensors="pt"
    )
    with torch.inference_mode():
        made = model.generate(
            **inputs, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
    ids, images = backend.images.encode(text, PICTURES)
    config = DecodeConfig(method="suffix", budget=8, max_tokens=12)
    request = Request(prompt_ids=ids, images=images, config=config)
    tokens = [token for _, step in Scheduler(backend).decode([request]) for token in step.tokens]
    assert tokens == made[0, len(ids) :].tolist()


def test_a_picture_that_the_target_does_not_take_is_refused(tmp_path):
    pytest.importorskip("torchvision")
    CONFIGS["qwen3_vl"]().save_pretrained(tmp_path)
    PROCESSORS["qwen3_vl"]().save_pretrained(tmp_path)
    processor = load_processor(tmp_path, read_config(tmp_path), "cuda", read_processor)
    with pytest.raises(PromptError, match="cannot take this image: absolute aspect ratio"):
        processor.encode(processor.placeholder, [picture(1, 1, 2000)])


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def model(request):
    with torch.device("meta"):  # positions depend on the configuration alone
        config = AutoConfig.for_model(request.param)
        kind = MODEL_MAPPING[type(config)]
        model = kind.__new__(kind)
        torch.nn.Module.__init__(model)
    model.config = config
    return model


@settings(repeated, max_examples=EXAMPLES or 25)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3
    ),
    st.integers(0, 3),
)
def test_positions_are_those_of_transformers(model, images, end):
    merge = model.config.vision_config.spatial_merge_size
    is_feature = []
    for text, height, width in images:
        is_feature += [False] * text + [True] * (height * width)
    is_feature = np.array(is_feature + [False] * end)
    grids = np.array([(1, height * merge, width * merge) for _, height, width in images])
    expected, deltas = model.get_rope_index(
        torch.zeros(1, len(is_feature), dtype=torch.long),
        torch.tensor(is_feature).int()[None],
        torch.tensor(grids),
    )
    actual = rotary_positions(is_feature, grids, merge)
    assert (actual == expected[:, 0].numpy()).all()
    assert actual.max() + 1 - len(is_feature) == deltas.item()
