"""The pages build without a warning and load nothing from elsewhere; what they tell the reader to type is real."""

import ast
import importlib.util
import inspect
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer.main
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from safetensors.torch import load_file

import tag2mask
from tag2mask import api, schema, tables
from tag2mask.backbones import BackboneSettings
from tag2mask.baselines import BASELINES, CAM
from tag2mask.cli import app
from tag2mask.core import FULL, Batch, Progress
from tag2mask.methods import METHODS
from tag2mask.recipe import load, names
from tag2mask.stages import STAGES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXAMPLE = DOCS / "examples/centres.py"
NOT_OURS = ("CUDA out of memory", "No space left on device")  # messages of PyTorch and of the system
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}
SMALL = ["data.images=16", "data.test=8", "data.size=48", "classify.augment={crop: 32, long: [32, 48]}",
         "classify.train={steps: 12, batch: 4, lr: 0.001}", "cams.scales=[1.0]"]  # fmt: skip


class Links(HTMLParser):
    """What a page loads, where it links to, and the ids it has."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.tags = [], [], set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in LOADS and given.get(LOADS[tag]) and given.get("rel") != "canonical":
            self.loads.append(given[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All pages: {path: what is in it}. A warning stops the build."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.run_event("startup", command="build", dirty=False)
        build(config)
    return folder, {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.html"))}


def blocks(page, *languages):
    """The code of a page in one of these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def elsewhere(address):
    return bool(urlsplit(address).netloc)


def test_no_page_loads_from_another_host(site):
    folder, pages = site
    assert len(pages) > len(PAGES)  # and a page for what is not found
    assert [(path.name, x) for path, text in pages.items() for x in Links(text).loads if elsewhere(x)] == []
    for path in folder.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path
    of_us = {"name", "recipe", "method", "work", "key"}  # as in masks/<name>.png
    assert [(path.name, found) for path, text in pages.items() if (found := Links(text).tags & of_us)] == []
    assert elsewhere(Links('<script src="//cdn.example/x.js"></script>').loads[0])


def test_every_link_inside_leads_somewhere(site):
    _, pages = site
    found, lost = {path: Links(text) for path, text in pages.items()}, []
    for path, page in found.items():
        for link in page.links if path.name != "404.html" else ():
            parts = urlsplit(link)
            if parts.netloc or parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target.exists() and (not parts.fragment or unquote(parts.fragment) in found[target].ids)
            lost += [] if there or link == "#" else [(path.name, link)]
    assert lost == []


def test_everything_there_is_has_its_place(site):
    folder, pages = site
    ids = {path.relative_to(folder).as_posix(): Links(text).ids for path, text in pages.items()}
    for name, method in METHODS.items():
        page = pages[folder / f"methods/{name}.html"]
        assert [key for key in schema.fields(method) if f"<code>{key}</code>" not in page] == []
    assert set(BASELINES) <= ids["methods/baselines.html"]
    assert set(STAGES) <= ids["stages.html"]
    assert [name for name in names() if f"<code>{name}</code>" not in pages[folder / "recipes.html"]] == []
    top = typer.main.get_command(app).commands
    paths = [
        (name, *rest) for name, one in top.items() for rest in [(x,) for x in getattr(one, "commands", ())] or [()]
    ]
    assert [path for path in paths if "-".join(("tag2mask", *path)) not in ids["commands.html"]] == []
    assert [
        form for form in top["export"].commands if f"<code>{form}</code>" not in pages[folder / "export.html"]
    ] == []
    assert [page for page in PAGES if page.relative_to(DOCS).as_posix() not in (ROOT / "mkdocs.yml").read_text()] == []


def test_an_unknown_line_to_fill_in_is_a_fault():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert "| `alpha` |" in generate.filled("<!-- make: options ppc -->")
    with pytest.raises(KeyError):
        generate.filled("<!-- make: nonsense -->")


def commands():
    """(page, words) of every command that a page shows."""
    found = []
    for page in [*PAGES, ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(page, "bash", "console") for line in block.splitlines()]
        lines += [line[4:] for line in text.splitlines() if line.startswith("    tag2mask ")]
        found += [(page.name, tuple(shlex.split(x, comments=True)[1:])) for x in lines if x.startswith("tag2mask ")]
    return list(dict.fromkeys(found))


def parsed(words, top):
    """Path of the command and its parameters; fails like the command line for what it does not know."""
    command, path = top, []
    context = command.make_context("tag2mask", list(words))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        path.append(name)
        context = command.make_context(name, rest, parent=context)
    return path, context.params


def test_commands_are_real():
    top = typer.main.get_command(app)
    assert len(commands()) > 50
    for page, words in commands():
        try:
            path, given = parsed(words, top)
            changes = list(given.get("set_") or ())
            if path[0] in ("run", "plan") and not given["recipe"].endswith(".yaml"):
                load(given["recipe"], changes)
            elif path[0] == "masks":
                network = {key: given[key] for key in ("backbone", "weights", "epochs")}
                changes = [*api.network_overrides(given["recipe"], **network), *changes]
                api.folder_recipe(given["folder"], {"tags": "tags.csv"}, changes, recipe=given["recipe"])
            elif path[0] == "describe":
                tables.describe(given["name"])
        except BaseException as fault:
            raise AssertionError(f"{page}: tag2mask {shlex.join(words)}: {fault}") from fault
    for wrong in (
        ["predikt"],
        ["predict", "work"],
        ["export", "coco", "work", "--where", "x"],
        ["demo", "--device", "x"],
    ):
        with pytest.raises(BaseException, match=r"."):
            parsed(wrong, top)


def test_recipes_on_the_pages_load(tmp_path):
    texts = [text for page in PAGES for text in blocks(page, "yaml")]
    assert len(texts) >= 2
    for text in texts:
        path = tmp_path / "shown.yaml"
        path.write_text(text if "data:" in text else f"data: {{name: folder, images: photos}}\n{text}")
        assert load(path).stages, yaml.safe_load(text)


def test_python_on_the_pages_fits_the_library():
    texts = [text for page in [*PAGES, ROOT / "README.md"] for text in blocks(page, "python")]
    assert len(texts) >= 4
    for text in texts:
        tree = ast.parse(text)
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            of = call.func
            if isinstance(of, ast.Attribute) and getattr(of.value, "id", "") == "tag2mask":
                keywords = {word.arg: None for word in call.keywords}
                inspect.signature(getattr(tag2mask, of.attr)).bind(*call.args, **keywords)
        if "from tag2mask.core import" in text:
            exec(compile(tree, "page", "exec"), {})


def test_troubleshooting_quotes_messages_that_exist():
    texts = [*(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))]
    said = [x.value for text in texts for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Constant)]
    said = [text for text in said if isinstance(text, str)]
    titles = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [words for title in titles for words in re.findall(r"`([^`]+)`", title)]
    assert len(quoted) > 20
    assert [words for words in quoted if words not in NOT_OURS and not any(words in text for text in said)] == []


@pytest.fixture
def centres():
    spec = importlib.util.spec_from_file_location("centres", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.Centres


@pytest.mark.parametrize("recipe", ["scenes-cam", "scenes-seam"])
def test_the_method_of_the_page_is_trained(centres, recipe, tmp_path, monkeypatch):
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60
    monkeypatch.setitem(METHODS, "centres", centres)
    options = tag2mask.Options(device="cpu", workers=0)
    run = tag2mask.run(recipe, [*SMALL, "classify.methods={centres: {dim: 8}}"], work=tmp_path, options=options)
    lines = (run.folder("classify") / "train.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["centres/centres"] for line in lines]
    assert losses[-1] > 0
    state = load_file(run.folder("classify") / "model.safetensors")
    assert state["methods.centres.found"].sum() > 1
    assert state["methods.centres.centres"].norm(dim=1).max() > 0
    assert tables.status(tmp_path, None)[-1]["result"] > 0  # seeds, made of the maps of that network


def test_the_method_of_the_page_is_its_formula(centres):
    torch.manual_seed(0)
    net = CAM(3, backbone=BackboneSettings(name="test_resnet", weights=None, output_stride=8))
    method = centres(weight=0.5, dim=4, momentum=0.75)
    method.bind(net, 3)
    tags = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])  # nobody has the last class, one image no tag
    known: dict[int, torch.Tensor] = {}
    for _ in range(3):
        images = torch.rand(3, 3, 32, 32)
        out = net.classify(net.encode(images), images)
        batch = Batch(images, tags, torch.arange(3), torch.ones(3, 1, 32, 32))
        loss = method.losses(batch, {FULL: out}, Progress(0, 0))["centres"]
        z, wanted, means = method.project(out.features["last"]), [], {0: [], 1: []}
        for i, k in [(0, 0), (1, 0), (1, 1)]:
            m = out.cams[i, k].relu()
            f = sum(m[y, x] * z[i, :, y, x] for y in range(4) for x in range(4)) / m.sum()
            means[k].append(f)
            wanted += [1 - f @ known[k] / f.norm() / known[k].norm()] if k in known else []
        torch.testing.assert_close(loss, 0.5 * torch.stack(wanted).mean() if wanted else torch.zeros(()))
        method.after_step(net)
        for k, found in means.items():
            mean = torch.stack(found).mean(dim=0).detach()
            known[k] = 0.75 * known[k] + 0.25 * mean if k in known else mean
            torch.testing.assert_close(method.centres[k], known[k])
        assert method.found.tolist() == [1, 1, 0]
