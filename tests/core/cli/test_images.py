"""Images on the command line: `generate --image`, files of prompts, and `chat`."""

import json

import pytest
from recordings import recording

pytest.importorskip("PIL")
from batch_files import records
from PIL import Image
from stub_images import FEATURES, StubProcessor, picture, url_of

from treeflash.text.prompt import image_part, text_part

TEXT = "Ein Bär."


@pytest.fixture
def model(scripted):
    model = scripted(TEXT, "Zwei.", "Drei.", "Vier.")
    model.backend.images = StubProcessor(model.tokenizer)
    return model


@pytest.fixture
def files(tmp_path):
    """Three images."""
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(picture(seed))
    return [str(path) for path in paths]


class TestGenerate:
    def test_images_stand_before_the_prompt(self, use, run, model, files):
        use(model)
        code, out, err = run("What is it?", "--image", files[0], "--image", files[1])
        assert (code, out) == (0, TEXT + "\n")
        (text,) = model.backend.images.texts
        assert text == "<|start|>user: <image><image>What is it?<|end|><|start|>assistant: "
        tokens = len(model.tokenizer.encode(text.replace("<image>", "")))
        assert f"after a prompt of {tokens + 2 * FEATURES}," in err

    def test_an_image_is_decoded_once(self, use, run, model, files):
        use(model)
        with recording(Image, "open") as opened:
            assert run("Hi", "--image", files[0], "--image", files[1])[0] == 0
        assert len(opened) == 2

    def test_without_a_prompt_a_sample_asks_for_the_image(self, use, run, model, files, stdin):
        stdin(None)
        use(model)
        assert run("--image", files[0])[0] == 0
        assert "<image>What does the image show?" in model.backend.images.texts[0]

    def test_several_answers(self, use, run, model, files):
        use(model)
        code, out, _ = run("Hi", "--image", files[0], "--n", "2")
        assert (code, out) == (0, f"{TEXT}\n{TEXT}\n")
        assert len(model.backend.prompts) == 1  # the second answer forks the state

    def test_a_comparison_has_the_images(self, use, run, scripted, files):
        model = use(scripted("warm", "warm", TEXT, TEXT))
        model.backend.images = StubProcessor(model.tokenizer)
        code, out, err = run("Hi", "--image", files[0], "--compare")
        assert (code, out) == (0, TEXT + "\n")
        assert "compared with plain decoding: equal" in err
        short, _, *whole = model.backend.prompts
        assert whole[0] == whole[1]
        assert model.tokenizer.decode(short) == "Hiassistant: "

    def test_a_target_without_images_says_why(self, use, run, scripted, files):
        use(scripted(TEXT))
        code, _, err = run("Hi", "--image", files[0])
        assert code == 2
        assert err == "error: the target takes no images: it only repeats a script\n"


class TestPromptFiles:
    def run(self, run, tmp_path, *rows):
        prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, _, err = run("--prompts", str(prompts), "--output", str(output), "--parallel", "1")
        return code, err, records(output)

    def test_images_are_found_beside_the_file(self, use, run, model, files, tmp_path):
        use(model)
        parts = [text_part("And "), image_part(url_of(picture(9))), text_part("?")]
        rows = [
            {"prompt": "What?", "images": ["0.png", files[1]]},
            {"messages": [{"role": "user", "content": parts}]},
            {"prompt": "Text."},
        ]
        code, _, written = self.run(run, tmp_path, *rows)
        assert code == 0
        assert [record["text"] for record in written] == [TEXT, "Zwei.", "Drei."]
        assert written[0]["prompt"] == [*map(image_part, ["0.png", files[1]]), text_part("What?")]
        first, second = model.backend.images.texts
        assert "user: <image><image>What?<|end|>" in first
        assert "user: And <image>?<|end|>" in second
        prompts = list(model.backend.prompts)
        assert self.run(run, tmp_path, *rows)[0] == 0
        assert model.backend.prompts == prompts  # nothing is decoded again

    def test_a_row_whose_image_is_missing_fails_alone(self, use, run, model, tmp_path, files):
        use(model)
        rows = {"prompt": "a", "images": ["none.png"]}, {"prompt": "b", "images": ["0.png"]}
        code, err, (first, second) = self.run(run, tmp_path, *rows)
        assert code == 2
        assert "1 with errors" in err
        assert first["error"].startswith(
            f"image 1: {tmp_path / 'none.png'} cannot be read: No such"
        )
        assert second["text"] == TEXT


class TestChat:
    @pytest.fixture
    def say(self, talk, model):
        return lambda *lines: talk(*(f"{line}\r" for line in lines), model=model)

    def test_an_image_goes_with_the_next_message(self, say, model, files):
        talked, shown = say(f"/image {files[0]}", f"/image {files[1]}", "What?", "And?")
        assert "images of the next message: 2" in shown
        first, _, second, _ = talked.messages
        urls = [url_of(picture(seed)).replace("image/png", "") for seed in (0, 1)]
        assert first["content"] == [*map(image_part, urls), text_part("What?")]
        assert second["content"] == "And?"
        assert "user: <image><image>What?<|end|>" in model.backend.images.texts[-1]

    def test_retry_and_files_keep_the_images(self, say, model, files, tmp_path):
        file = tmp_path / "talk.jsonl"
        before, _ = say(f"/image {files[0]}", "What?", "/retry", f"/save {file}")
        kept = list(before.messages)
        (tmp_path / "0.png").unlink()  # the conversation has its bytes
        after, shown = say(f"/load {file}", "And?")
        assert "error" not in shown
        assert after.messages[:2] == kept
        assert "<image>What?" in model.backend.images.texts[-1]

    def test_mistakes(self, say, files, model):
        _, shown = say("/image", "/image none.png", f"/image {files[0]}", "/reset", "Hi")
        assert "/image needs the name of a file" in shown
        assert "none.png cannot be read: No such file" in shown
        assert not model.backend.images.texts  # the new conversation has no image
        model.backend.images = "it has no vision tower"
        assert "the target takes no images: it has no" in say(f"/image {files[0]}")[1]
