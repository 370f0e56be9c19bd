"""`treeflash.transformers` gives what transformers' own `generate` gives, and refuses the rest."""

import copy
import gc
import pickle
import string
import weakref
from functools import partial

import pytest
from stand_ins import stand_in

from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import CheckpointError, ConfigError, PromptError
from treeflash.hub import models as hub_models
from treeflash.hub.published import PublishedDrafter
from treeflash.testing import require
from treeflash.testing.models import write_pair
from treeflash.transformers import PAIRS, disable, enable, generate

require("torch")

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

VOCAB = 40
LENGTHS = 12, 5, 12
TOKENS = {"max_new_tokens": 16, "pad_token_id": 3, "eos_token_id": None}


def write_models(folder, family):
    """A random target and drafter; the loaded target, and the options that name the drafter."""
    target, drafter = write_pair(folder, family, vocab_size=VOCAB)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    options = {"custom_generate": generate, "drafter": drafter, "budget": 16}
    return model, options


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def model(models):
    return models[0]


@pytest.fixture
def options(models):
    return models[1]


def prompts(lengths=LENGTHS):
    """Random prompts, padded on the left."""
    ids = torch.randint(4, VOCAB, (len(lengths), max(lengths)), generator=torch.Generator())
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.where(mask, 3), "attention_mask": mask.long()}


def texts(model, lengths=LENGTHS, **settings):
    """The sequences that `generate` makes of random prompts."""
    return model.generate(**prompts(lengths) | TOKENS | settings).tolist()


class Streamer:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended = True


class After(StoppingCriteria):
    """Ends a sequence after a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "qwen3_5"])
def test_greedy_tokens_are_those_of_transformers(family, tmp_path):
    model, options = write_models(tmp_path, family)
    expected = texts(model, do_sample=False)
    for method in ("treeflash", "suffix"):
        assert texts(model, do_sample=False, method=method, **options) == expected, method


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    """Its prompts have special tokens alone, which nobody would notice."""
    model, options = write_models(tmp_path, "llama")
    (tmp_path / "target" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        texts(model, **options)
    (tmp_path / "target" / "tokenizer.json").touch()
    texts(model, **options)


def test_the_best_published_drafter_that_can_be_used_is_the_default(
    model, options, tmp_path, monkeypatch
):
    model = copy.deepcopy(model)
    names = tmp_path / "missing", options["drafter"]
    published = [PublishedDrafter(name=str(name)) for name in names]
    stand_in(monkeypatch, hub_models, published_drafters=lambda target: published)
    expected = texts(model, do_sample=False)
    given = {"custom_generate": generate, "budget": 16}
    with pytest.warns(UserWarning, match="the drafter .*missing is skipped"):
        assert texts(model, **given) == expected
    assert texts(model, **given) == expected
    assert vars(model)[PAIRS].keys() == {"auto", options["drafter"]}  # which was found once


def test_sequences_end_at_the_limit_of_the_model(model, options):
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = 20
    (expected,) = texts(model, [12], do_sample=False)
    with pytest.warns(UserWarning, match="sequences end at 20 tokens, the model's limit"):
        assert texts(model, [12], do_sample=False, **options) == [expected[:20]]


def test_an_empty_prompt_is_refused(model, options):
    empty = {name: tensor[:1, :0] for name, tensor in prompts().items()}
    with pytest.raises(PromptError, match="no tokens"):
        texts(model, **empty, **options)


def attributes(model):
    """All attributes of all modules, hooks among them, but for the loaded pairs."""
    return [
        {
            name: dict(x) if isinstance(x, dict) else x
            for name, x in vars(module).items()
            if name != PAIRS
        }
        for module in model.modules()
    ]


def test_the_model_stays_its_owners(model, options):
    logits, before = model(**prompts()).logits, attributes(model)
    texts(model, **options)
    assert attributes(model) == before
    assert torch.equal(model(**prompts()).logits, logits)


def test_the_attention_is_restored_after_an_error(model, options):
    before = model(**prompts()).logits
    with pytest.raises(ConfigError, match="budget"):
        texts(model, **options | {"budget": 0})
    failing = StoppingCriteriaList([lambda ids, scores: 1 / 0])
    with pytest.raises(ZeroDivisionError):
        texts(model, stopping_criteria=failing, **options)
    assert torch.equal(model(**prompts()).logits, before)


def test_the_pair_ends_with_its_model(tmp_path):
    model, options = write_models(tmp_path, "llama")
    tokens = texts(model, **options)
    pair = weakref.ref(next(iter(vars(model)[PAIRS].values())))
    assert vars(copy.deepcopy(model))[PAIRS] == {}
    other = pickle.loads(pickle.dumps(model))
    assert texts(other, **options) == tokens
    texts(model, **options)
    assert pair() is next(iter(vars(model)[PAIRS].values()))
    del model
    gc.collect()
    assert pair() is None


def test_other_weights_make_another_pair(tmp_path):
    model, options = write_models(tmp_path, "llama")
    texts(model, **options)
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert texts(model, **options) == texts(model, do_sample=False)


def test_sampled_sequences_follow_the_seed_of_pytorch(model, options):
    filters = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    given = {"do_sample": True, "num_return_sequences": 3, **filters, **options}
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(texts(model, [7], **given))
    assert outputs[0] == outputs[1] != outputs[2]
    again = [texts(model, [7], **given, seed=7) for _ in range(2)]
    assert again[0] == again[1] != outputs[2]
    assert len({tuple(row) for row in outputs[0]}) == 3


def test_sampling_settings_and_the_repetition_penalty_arrive(model, options):
    greedy = texts(model, [7], do_sample=False)
    normalised = {"top_k": 1, "renormalize_logits": True}
    for setting in (normalised, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-5}):
        assert texts(model, [7], do_sample=True, **setting, **options) == greedy
    penalised = {"do_sample": False, "repetition_penalty": 1.8}
    expected = texts(model, [7], **penalised)
    assert texts(model, [7], **penalised, **options) == expected != greedy


def test_sequences_end_at_end_tokens_and_at_criteria(model, options):
    free = texts(model, do_sample=False)
    token = free[0][LENGTHS[0] + 3]
    criteria = StoppingCriteriaList([After(token)])
    after_all = StoppingCriteriaList([lambda ids, scores: ids.shape[1] == LENGTHS[0] + 6])
    for ends in (
        {"eos_token_id": token},
        {"stopping_criteria": criteria},
        {"stopping_criteria": criteria, "eos_token_id": 2},
        {"stopping_criteria": criteria + after_all},
    ):
        expected = texts(model, do_sample=False, **ends)
        assert expected != free
        assert texts(model, **ends, **options) == expected


@pytest.mark.parametrize("in_config", [False, True])
def test_stop_strings_of_an_enabled_model(model, options, in_config):
    """The library hands the tokenizer to no callable, and then misses it."""
    letters = f"{string.ascii_lowercase}{string.digits}.,;:"
    characters = Tokenizer(BPE({x: i for i, x in enumerate(letters)}, []))
    characters.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    free = texts(model, do_sample=False)
    ends = {"stop_strings": [letters[free[0][LENGTHS[0] + 3]]]}
    if in_config:
        ends = {"generation_config": GenerationConfig(**ends, **TOKENS)}
    expected = texts(model, do_sample=False, tokenizer=tokenizer, **ends)
    assert expected != free
    enable(model, drafter=options["drafter"], budget=16)
    try:
        assert texts(model, tokenizer=tokenizer, **ends) == expected
        with pytest.raises(ValueError, match="tokenizer"):
            texts(model, **ends)
    finally:
        disable(model)


def test_streamers_get_every_token_in_turn(model, options):
    given = prompts() | TOKENS
    own, ours, through_enable = Streamer(), Streamer(), Streamer()
    model.generate(**given, do_sample=False, streamer=own)
    loop = partial(generate, streamer=ours)
    model.generate(**given, **options | {"custom_generate": loop})
    enable(model, drafter=options["drafter"], budget=16)
    output = model.generate(**given, streamer=through_enable, return_dict_in_generate=True)
    disable(model)
    assert own.tokens == through_enable.tokens
    assert own.tokens[len(prompts()["input_ids"].flatten()) :] == ours.tokens
    assert output.sequences[:, LENGTHS[0] :].T.flatten().tolist() == ours.tokens
    assert ours.ended
    assert "generate" not in vars(model)


def test_a_folder_of_the_hub_decodes(model, options, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "from treeflash.transformers import run as generate\n"
    )
    (tmp_path / "custom_generate" / "requirements.txt").write_text("treeflash\n")
    given = options | {"custom_generate": str(tmp_path), "trust_remote_code": True}
    assert texts(model, **given) == texts(model, do_sample=False)
    assert PAIRS in vars(model)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"min_new_tokens": 2, "eos_token_id": 2}, "MinLengthLogitsProcessor"),
        ({"typical_p": 0.5, "do_sample": True}, "TypicalLogitsWarper"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"cache_implementation": "static"}, "cache_implementation 'static'"),
        ({"position_ids": torch.arange(12)[None].expand(3, -1)}, "position_ids"),
        ({"attention_mask": prompts()["attention_mask"].flip(-1)}, "attention_mask"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model, options, setting, named):
    with pytest.raises(ValueError, match=named) as error:
        texts(model, **setting, **options)
    assert "\n" not in str(error.value)


def test_training_mode_is_refused(model, options):
    model.train()
    with pytest.raises(ConfigError, match="training mode"):
        texts(model, **options)
    model.eval()


def test_costs_are_measured_once_for_all_processes(model, options, tmp_path, monkeypatch):
    """A copy of a model begins without a pair, as a new process does."""
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    measured, costs = [], VerifyCosts({1: 1.0, 8: 1.1})
    stand_in(monkeypatch, VerifyCosts, measure=lambda *args: measured.append(1) or costs)
    for _ in range(2):
        texts(copy.deepcopy(model), do_sample=False, **options | {"budget": "auto"})
    assert len(measured) == 1
