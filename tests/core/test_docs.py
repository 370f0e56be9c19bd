"""What the documentation names exists."""

import re
import shlex
from configparser import ConfigParser
from contextlib import redirect_stdout, suppress
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest

from treeflash.command import COMMANDS, main
from treeflash.hub.published import BUNDLED_DRAFTER, DEFAULT_TARGET, PUBLISHED_DRAFTERS

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "smollm2" / "README.md"),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "families.md"),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def quoted(page: Path) -> set[str]:
    """The names that a page quotes as code, in text and in tables."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return set(re.findall(r"`([^`]+)`", text))


@cache
def names_of_modules() -> set[str]:
    folders = ("backends", "benchmarks", "docs", "tests", "treeflash")
    return {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}


@EVERY_PAGE
def test_paths_exist(page):
    tops = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
    paths = {name for name in quoted(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name)}
    files = {name for name in paths if "/" not in name and name.endswith(".py")}
    assert not [name for name in paths if name.startswith(tops) and not (ROOT / name).exists()]
    assert files <= names_of_modules()


def modules_of(page):
    text = page.read_text(encoding="utf-8")
    return re.findall(r"(?:-m|from|import) ((?:treeflash|benchmarks)[\w.]*)", text)


def links_of(page):
    return re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))


def commands_of(page):
    """The commands of `treeflash` in a page's code, with arguments or without."""
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"```sh\n.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    return {name for part in code for name in re.findall(r"\btreeflash ([a-z]+)", part)}


def test_the_readme_names_all_it_should():
    readme = ROOT / "README.md"
    assert "benchmarks.performance" in modules_of(readme)
    assert {"chat", "generate", "serve", "models", "train"} <= commands_of(readme) <= set(COMMANDS)
    assert {"docs/architecture.md", "docs/sampling.md", "docs/serving.md"} <= set(links_of(readme))


@EVERY_PAGE
def test_commands_exist_and_are_written_as_users_type_them(page):
    assert commands_of(page) <= set(COMMANDS)
    text = page.read_text(encoding="utf-8")
    names = "|".join(COMMANDS)
    assert not re.findall(rf"python -m treeflash\b.*|`treeflash\.(?:{names})`", text)


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
IMPORTS = re.compile(r"^from (benchmarks[\w.]*) import \(?([\w, \n]+)", re.MULTILINE)


@cache
def options_of(command):
    """The options of a command of `treeflash`, or those in the source of a benchmark."""
    if command in COMMANDS:
        with redirect_stdout(StringIO()) as shown, suppress(SystemExit):
            main([command, "--help"])
        return set(OPTION.findall(shown.getvalue()))
    path = ROOT / command.replace(".", "/")
    files = [path / "__main__.py", path.with_suffix(".py")]
    source = next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")
    options = set(re.findall(rf'"({OPTION.pattern})"', source))
    if "add_model_options" in source:
        options |= options_of("generate")
    for package, names in IMPORTS.findall(source):
        for module in (package, *(f"{package}.{name}" for name in re.findall(r"\w+", names))):
            options |= options_of(module)
    return options


@EVERY_PAGE
def test_the_command_lines_of_pages_are_accepted(page):
    """All that they lack are the files and models that they name."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    for line in re.findall(
        r"^(?:.*&& |\S*/)?treeflash (.*)", "\n".join(blocks), flags=re.MULTILINE
    ):
        command, *words = shlex.split(line, comments=True)
        parser = import_module(f"treeflash.commands.{command}").make_parser()
        own = words[: words.index("--")] if "--" in words else words
        parser.parse_args(own)


@EVERY_PAGE
def test_commands_have_the_options_that_pages_give_them(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    code = re.findall(r"```sh\n.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    lines = [line for part in code for line in re.split(r"[\n`;#|]|&&| -- ", part)]
    for line in lines:
        if found := re.search(r"\btreeflash ([a-z]+)|python -m (benchmarks[\w.]*)", line):
            command = found[1] or found[2]
            assert set(OPTION.findall(line[found.end() :])) <= options_of(command), line


def test_a_mac_has_the_options_of_its_page():
    """The commands also suit its shell, in which no comment can follow a command."""
    page = ROOT / "docs" / "mac.md"
    assert "#" not in "".join(re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
    commands = ("chat", "serve", "doctor")
    known = set.union(*map(options_of, commands))
    flags = {OPTION.match(name)[0] for name in quoted(page) if OPTION.match(name)}
    assert {"--draft-bits", "--wired"} < flags <= known


@EVERY_PAGE
def test_modules_exist(page):
    for name in modules_of(page):
        path = ROOT / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{page.name} names {name}"


@EVERY_PAGE
def test_linked_pages_exist(page):
    for link in links_of(page):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


@EVERY_PAGE
def test_links_lead_to_headings(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    for link, anchor in links:
        text = (page.parent / link if link else page).read_text(encoding="utf-8")
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        headings = re.findall(r"^#+ (.+)", text, flags=re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings]
        assert anchor in anchors, f"{page.name} links to {link}#{anchor}"


def test_every_file_in_the_cache_is_documented():
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    files = [path for top in ("treeflash", "backends") for path in (ROOT / top).rglob("*.py")]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = re.findall(r'cache_folder\(\) / "(\w+)"', sources)
    assert {"costs", "chat_history", "kernels"} <= set(names)
    for name in [*names, DEFAULT_TARGET.rpartition("/")[2]]:
        assert re.search(rf"`{name}/?` in the cache|`{name}/`", page), name
    assert "`TREEFLASH_CACHE`" in page


def test_nobody_is_sent_to_a_package_that_is_not_published():
    """Whoever registered the name would be installed."""
    tops = ("treeflash", "backends", "benchmarks", "docs")
    paths = [
        path for top in tops for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".md")
    ]
    paths += [*PAGES, ROOT / "CHANGELOG.md", *ROOT.glob("Dockerfile*")]
    assert len(paths) > 200
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\btreeflash\[|\binstall [\"']?treeflash", text), path


def test_the_sampling_rule_in_numpy_holds():
    """Its assertions compare the texts, the passes and the sampled distribution."""
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert code.count("assert ") == 3
    exec(code, {})


def test_the_architecture_names_every_package():
    names = quoted(ARCHITECTURE)
    paths = [path for path in (ROOT / "treeflash").iterdir() if not path.name.startswith("_")]
    paths = [path for path in paths if path.is_dir() or path.suffix == ".py"]
    assert ROOT / "treeflash" / "decoding" in paths
    for path in paths:
        assert f"treeflash/{path.name}" + "/" * path.is_dir() in names


def test_the_architecture_names_classes_and_methods_as_they_are():
    """Where several classes have a name, one of them has the method."""
    paths = [path for top in ("treeflash", "backends") for path in (ROOT / top).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    page = ARCHITECTURE.read_text(encoding="utf-8")
    names = set(re.findall(r"\b([A-Z]\w+)\.([a-z]\w*)\b", page))
    assert names, "no method was found"
    for owner, member in names:
        bodies = re.findall(rf"^class {owner}\b.*?(?=^\S|\Z)", source, re.DOTALL | re.MULTILINE)
        assert bodies, f"docs/architecture.md names {owner}"
        defined = re.compile(rf"^    (def )?{member}\b", re.MULTILINE)
        assert any(map(defined.search, bodies)), f"{owner}.{member}"


def test_the_readme_counts_the_families_of_the_list():
    families = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    counts = re.findall(r"^- `(?:cuda|mlx)`, .*: (\d+) verified", families, flags=re.MULTILINE)
    rows = re.findall(r"^\| \S+ \| (\S+) \| (\S+) \|$", families, flags=re.MULTILINE)
    assert counts == [str(column.count("verified")) for column in zip(*rows, strict=True)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(\d+) model types of", readme) == counts


def test_the_drafters_of_the_table_are_documented():
    page = (ROOT / "docs" / "drafters.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    names = [drafter.name for drafters in PUBLISHED_DRAFTERS.values() for drafter in drafters]
    others = [name for name in names if name != BUNDLED_DRAFTER]
    assert others
    for name in others:
        pattern = rf"(?:^|[ ,]){re.escape(name)}(?:,|$| \|)"
        assert any(re.search(pattern, row) for row in rows), name


def test_the_workflow_runs_what_exists():
    """Its jobs on Macs cannot be tried here."""
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(workflows))
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    environments = re.findall(r"tox -e ([\w,-]+)", text)
    assert {"tests", "nightly"} <= set(environments)
    for name in environments:
        assert re.search(rf"\[testenv:(\{{.*)?\b{name}\b", tox)
    (variable,) = re.findall(r"(TREEFLASH_TEST_\w+): cpu", text)
    assert variable in tox
    assert variable in (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    (module,) = set(re.findall(r"(?:-m|from) (benchmarks\.\w+)", text))
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert "\nINCLUDES = " in source
    assert re.search(r'print\(f"xcrun -sdk macosx metal -c -I ', source), "the same command"
    assert re.search(r"xcrun -sdk macosx metal (-std=.+ )?-c -I ", text)


def test_the_device_environment_sees_the_gpu_that_was_chosen():
    """On a shared machine, `CUDA_VISIBLE_DEVICES` alone says whose GPU is whose."""
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    passed = tox["testenv:device"]["pass_env"].split()
    assert "{[testenv]pass_env}" in passed
    for name in (
        *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NCCL_DEBUG"),
        *("PYTORCH_ALLOC_CONF", "TRITON_CACHE_DIR", "HF_TOKEN"),
    ):
        assert any(fnmatch(name, pattern) for pattern in passed), name
