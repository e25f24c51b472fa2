"""House rules that neither ruff nor mypy knows, as tests. Style, docstrings and types are `make lint`."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tag2mask.data.scenes import Scenes
from tag2mask.export import write_mask
from tag2mask.pipeline import digest
from tag2mask.recipe import SOURCES, built_in, load, load_text

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/tag2mask"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST = 300  # lines; about what is read in one go
LONGER = {"methods/hsc.py"}  # a fifth of it is the table of where the released code differs
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def found(rule, trees=TREES):
    """["file:line", ...] of all nodes for which the rule holds."""
    hits = [(name, node) for name, tree in trees.items() for node in ast.walk(tree) if rule(node)]
    return [f"{name}:{getattr(node, 'lineno', 'a signature')}" for name, node in hits]


def called(node):
    """The last word of what is called: "load" for torch.load(...)."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def rooms(*names):
    return {file: tree for file, tree in TREES.items() if file.split("/")[0] in names}


def has_keyword(node, name, value):
    given = [word.value for word in node.keywords if word.arg == name]
    return any(isinstance(word, ast.Constant) and word.value is value for word in given)


# The rules, each a function of one node, so that the tests below can show that they find what they forbid.


def writes_a_global(node):
    return isinstance(node, ast.Global)


def names_a_gpu(node):
    return called(node) == "cuda" or (isinstance(node, ast.Constant) and str(node.value).startswith("cuda"))


def counts_the_classes_of_a_benchmark(node):
    """20 or 21 (VOC), 80 or 81 (COCO) as a number of anything; 2**20 is no such number, nor are CPAL's neighbours."""
    inside = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.Constant)]
    if isinstance(node, ast.arguments):
        named = zip(node.kwonlyargs, node.kw_defaults, strict=True)
        others = [value for word, value in named if word.arg == "neighbours"]
        inside = [child for child in inside if child not in others]
    counted = any(type(child.value) is int and child.value in (20, 21, 80, 81) for child in inside)
    return counted and not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow))


def reads_a_pickle(node):
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
        return bool({"pickle", "joblib", "dill", "shelve"} & set(names))
    if not isinstance(node, ast.Call):
        return False
    owner = getattr(getattr(node.func, "value", None), "id", "")
    if called(node) == "load" and owner == "torch":
        return not has_keyword(node, "weights_only", True)
    if called(node) == "load" and owner == "np":
        return not has_keyword(node, "allow_pickle", False)
    return has_keyword(node, "weights_only", False) or has_keyword(node, "allow_pickle", True)


def takes_anything(node):
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and node.args.kwarg is not None


def knows_of_processes(node):
    words = []
    if isinstance(node, ast.Import):
        words = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        words = [f"{node.module}.{alias.name}" for alias in node.names]
    return any(word.startswith(("torch.distributed", "accelerate")) for word in words)


def leaves_work_undone(node):
    return (isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node)) or (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"\b(TODO|FIXME|XXX)\b", node.value)
    )


def test_no_global_statement():
    assert found(writes_a_global) == []


def test_devices_are_named_in_the_engine_only():
    others = {file: tree for file, tree in TREES.items() if not file.startswith("engine/") and file != "cli.py"}
    assert found(names_a_gpu, others) == []


def test_no_number_of_classes_is_built_in():
    networks = rooms(
        "core", "ops", "backbones", "baselines", "methods", "refine", "segment", "metrics", "engine", "stages"
    )
    assert found(counts_the_classes_of_a_benchmark, networks) == []


def test_no_pickle_is_read():
    others = {file: tree for file, tree in TREES.items() if file != "data/tag_formats/legacy_npy.py"}  # arrays alone
    assert found(reads_a_pickle, others) == []


def test_signatures_say_what_they_take():
    places = found(lambda node: takes_anything(node) and getattr(node, "name", "") != "make")
    assert places == []  # schema.make calls any component with what only its caller has, such as the data
    assert len(found(takes_anything)) == 1


def test_processes_are_known_in_two_places_only():
    others = {file: tree for file, tree in TREES.items() if not file.startswith("engine/") and file != "ops/gather.py"}
    assert found(knows_of_processes, others) == []


def test_nothing_is_left_to_do():
    others = {file: tree for file, tree in TREES.items() if file != "core/baseline.py"}  # the contract has no default
    assert found(leaves_work_undone, others) == []


def test_files_are_short():
    assert len(FILES) > 50
    assert {name for name in TREES if len((SOURCE / name).read_text().splitlines()) > LONGEST} <= LONGER


@pytest.mark.parametrize(
    "rule, line",
    [
        (writes_a_global, "def f():\n    global x"),
        (names_a_gpu, "x.cuda()"),
        (names_a_gpu, "x.to('cuda:0')"),
        (counts_the_classes_of_a_benchmark, "nn.Conv2d(d, 20, 1)"),
        (counts_the_classes_of_a_benchmark, "num_classes = 21"),
        (counts_the_classes_of_a_benchmark, "if k == 80: pass"),
        (counts_the_classes_of_a_benchmark, "def f(a, num_classes=21, c=2): pass"),
        (counts_the_classes_of_a_benchmark, "def f(*, neighbours=20, classes: int = 20): pass"),
        (counts_the_classes_of_a_benchmark, "range(1, 21)"),
        (reads_a_pickle, "torch.load(path)"),
        (reads_a_pickle, "torch.load(path, weights_only=False)"),
        (reads_a_pickle, "np.load(path)"),
        (reads_a_pickle, "np.load(path, allow_pickle=True)"),
        (reads_a_pickle, "from pickle import load"),
        (reads_a_pickle, "import pickle"),
        (takes_anything, "def f(*, a, **kwargs): pass"),
        (knows_of_processes, "import torch.distributed as dist"),
        (knows_of_processes, "from torch import distributed"),
        (knows_of_processes, "from accelerate import Accelerator"),
        (leaves_work_undone, "raise NotImplementedError('later')"),
    ],
)
def test_the_rules_find_what_they_forbid(rule, line):
    assert found(rule, {"example.py": ast.parse(line)})


def test_the_rules_let_the_rest_pass():
    lines = (
        "x = 2**20; torch.load(p, weights_only=True); np.load(p, allow_pickle=False); yaml.load(t, Loader); f(200, 2.0)"
    )
    lines += "; f = lambda *, a=1, neighbours=20: 1"
    for rule in (names_a_gpu, counts_the_classes_of_a_benchmark, reads_a_pickle):
        assert found(rule, {"example.py": ast.parse(lines)}) == []


def test_import_order():
    pytest.importorskip("importlinter")
    command = "from importlinter.cli import lint_imports_command as main; main(['--no-cache', '--no-logo'])"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


def test_methods_need_torch_alone():
    """`from tag2mask.methods import ...` works in anybody's own training loop."""
    command = "import sys, tag2mask.methods, tag2mask.ops.cams; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "torch" in imported
    assert not imported & {"timm", "torchvision", "accelerate", "PIL", "pydantic", "typer", "yaml", "scipy", "rich"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few images with tags: what a recipe for folders is planned on."""
    root = tmp_path_factory.mktemp("folder")
    samples = Scenes(images=8, test=1, size=32).split("train")
    lines = ["image,ground,fox"]
    for index in range(8):
        write_mask(root / f"images/{index}.png", samples.mask(index))  # a palette picture is a picture, too
        lines.append(f"{index},{index % 2},{(index + 1) % 2}")
    (root / "tags.csv").write_text("\n".join(lines))
    return [f"data.images={root / 'images'}", f"data.tags={root / 'tags.csv'}"]


@pytest.mark.parametrize("name", built_in())
def test_every_recipe_can_be_planned(name, folder, tmp_path):
    source = yaml.safe_load(load_text(name))["data"]["name"]
    recipe = load(name, folder if source == "folder" else [] if source == "scenes" else ["data.root=somewhere"])
    assert source in SOURCES and recipe.title and recipe.name == name
    fingerprint = recipe.source().fingerprint if source in ("folder", "scenes") else "of other people's data"
    stages = recipe.plan(fingerprint)
    assert [stage.name for stage in stages] == list(recipe.stages)
    assert len({stage.key for stage in stages}) == len(stages)
    assert all(digest(stage.settings) for stage in stages)

    copy = tmp_path / f"{name}.yaml"  # what is kept beside the results can be run again, and means the same
    copy.write_text(recipe.as_yaml())
    assert [stage.key for stage in load(copy).plan(fingerprint)] == [stage.key for stage in stages]


def tracked():
    """Files of the repository, or what there is of it where there is no git."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    listed = [ROOT / line for line in done.stdout.splitlines()] if done.returncode == 0 else []
    listed = listed or [*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("*.*")]
    return [path for path in listed if path.is_file() and path != Path(__file__)]


SOMEBODYS = re.compile(
    r"(?<![\w.$}])/(home/\w+|Users/\w+|tmp/\w+|mnt/\w+)/"  # somebody's machine
    r"|(extra-)?index-url|trusted-host|//[^/\s]*/(simple|artifactory|nexus)/"  # somebody's network
)


def test_no_file_knows_where_it_was_written():
    hits = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        lines = [number for number, line in enumerate(text.splitlines(), start=1) if SOMEBODYS.search(line)]
        hits += [f"{path.relative_to(ROOT)}:{number}" for number in lines]
    assert hits == []


@pytest.mark.parametrize(
    "line, found",
    [
        ("open('/mnt/disk/a/b')", True),
        ("/home/anna/voc", True),
        ("pip install --index-url x", True),
        ("https://mirror.example/simple/torch", True),
        ("work/classify-0123456789/", False),
        ("see https://example.org/home/x/y", False),
    ],
)
def test_the_search_for_machines_finds_them(line, found):
    assert bool(SOMEBODYS.search(line)) == found
