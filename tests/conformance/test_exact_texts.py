"""Exact mode in bfloat16 through the server and files of prompts: the texts of plain decoding."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from treeflash.commands.generate import main
from treeflash.config import LoadConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.language_model import LanguageModel
from treeflash.testing import require
from treeflash.testing.models import write_pair
from treeflash.text.tokenizer import Tokenizer

require("torch")

from byte_tokens import SPECIAL, save_tokenizer
from servers import MAX_POSITIONS, parse, serving
from small_training import write_prompts
from treeflash_cuda.backend import load

PREFIX = "A prefix that all of these questions have, so that the server finds it in its cache. " * 3
QUESTIONS = [
    "Why?",
    "Hello.",
    *(PREFIX + x for x in ("Why?", "When?", "What for? Say it in short.")),
]
EXACT = LoadConfig(device="cpu", dtype="bfloat16", exact=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    shape = {"vocab_size": len(SPECIAL) + 256, "max_positions": MAX_POSITIONS}
    folders = write_pair(tmp_path_factory.mktemp("tiny"), "llama", seeds=(3, 4), **shape)
    save_tokenizer(folders[0])
    return folders


def test_the_server_under_load_answers_as_plain_decoding(folders):
    """Clients at once, prompts in chunks, prefix-cache hits, and clients that leave."""
    target, drafter = folders
    budgets = AdaptiveBudgets(VerifyCosts(dict.fromkeys(SIZES, 1.0)))
    model = LanguageModel(
        load(target, drafter, EXACT),
        Tokenizer.from_folder(target),
        target,
        EXACT,
        drafter,
        adaptive_budgets=budgets,
    )
    jobs = [
        (question, {"max_tokens": 12, "temperature": temperature, "seed": seed})
        for seed, question in enumerate(QUESTIONS)
        for temperature in (0.0, 1.0)
    ]
    answers = []

    def client(seed):
        rng = random.Random(seed)
        for _ in range(2):
            number = rng.randrange(len(jobs))
            question, options = jobs[number]
            body = {"messages": [{"role": "user", "content": question}], **options}
            if rng.random() < 0.3:
                body |= {"stream": True}
                with running.client.stream("POST", "/v1/chat/completions", json=body) as response:
                    list(islice(parse(response), rng.randint(1, 4)))
                continue
            answer = running.chat(question, **options).json()
            answers.append((number, answer["choices"][0]["message"]["content"], answer["usage"]))

    with serving(model, max_parallel=6) as running:
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(client, range(8)))
        metrics = running.client.get("/metrics").text
    assert 'treeflash:spec_decode_num_draft_tokens_total{model="tiny"} 0.0' not in metrics
    assert any(x["prompt_tokens_details"]["cached_tokens"] for _, _, x in answers)
    plain = {}
    for number, text, usage in answers:
        if number not in plain:
            question, options = jobs[number]
            messages = [{"role": "user", "content": question}]
            plain[number] = model.generate(messages, method="ar", **options)
        expected = plain[number].text, len(plain[number].token_ids)
        assert (text, usage["completion_tokens"]) == expected


def test_a_file_of_prompts_is_answered_as_by_plain_decoding(folders, tmp_path, capsys):
    rows, texts = tmp_path / "rows.jsonl", []
    prompts = [x + str(i) for i in range(2) for x in QUESTIONS]
    write_prompts(rows, prompts)
    models = ["--target", folders[0], "--drafter", folders[1], "--backend", "cuda"]
    models += ["--device", "cpu", "--dtype", "bfloat16", "--exact", "--max-tokens", "12"]
    for options in (["--parallel", "8", "--budget", "12"], ["--parallel", "1", "--method", "ar"]):
        output = tmp_path / f"{options[1]}.jsonl"
        command = [*models, *options, "--prompts", rows, "--output", output]
        assert main([str(x) for x in command]) == 0, capsys.readouterr().err
        records = map(json.loads, output.read_text("utf-8").splitlines())
        texts.append({x["id"]: (x["text"], sum(x["accepted_lengths"])) for x in records})
    assert texts[0] == texts[1]
