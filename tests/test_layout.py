"""The structure of the library: imports only go down, files stay short, start-up stays quick."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / "src"

# A room imports only rooms on lines above its own. What lies in no folder (cli, the package itself)
# comes last: the public names, which only users import.
ROOMS = """
    compat jail
    common
    config distributed segmenters
    algorithm
    models
    rewards
    data
    runs
    rollout views
    evaluation testing training
    credit
    commands estimate
"""

HEAVY = {
    *("accelerate", "datasets", "deepspeed", "matplotlib", "nltk", "numpy", "pandas", "peft"),
    *("pyarrow", "safetensors", "spacy", "tensorboard", "tokenizers", "torch", "transformers"),
}


def modules(source: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the library."""
    files = sorted((source / "marlhf").rglob("*.py"))
    names = [".".join(f.relative_to(source).with_suffix("").parts) for f in files]
    return dict(zip((n.removesuffix(".__init__") for n in names), files, strict=True))


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the library that a module imports anywhere, also inside functions.

    `from marlhf.data import files` imports `marlhf.data.files`; the version is a constant and
    counts as none.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {
                name if name in known else node.module or ""
                for name in full
                if name != "marlhf.__version__"
            }
    return names & set(known)


def upward_imports(source: Path, rooms: str) -> list[str]:
    """Every import between rooms that does not point up the list, as "importer -> imported"."""
    levels = [line.split() for line in rooms.strip().splitlines()]
    above = {room: set().union(*levels[:n]) for n, line in enumerate(levels) for room in line}
    known = modules(source)
    room = {name: (name + "..").split(".")[1] for name in known}
    return [
        f"{name} -> {module}"
        for name, path in known.items()
        if room[name] in above  # not what lies in no room
        for module in sorted(imports(path, known))
        if room[module] not in above[room[name]] | {room[name]}
    ]


def test_every_folder_is_a_room():
    folders = {f.name for f in (SOURCE / "marlhf").iterdir() if (f / "__init__.py").exists()}
    assert folders == set(ROOMS.split())


def test_imports_between_rooms_run_one_way():
    assert upward_imports(SOURCE, ROOMS) == []


def test_no_modules_import_each_other():
    known = modules(SOURCE)
    TopologicalSorter({name: imports(path, known) for name, path in known.items()}).prepare()


@pytest.mark.parametrize(
    "line",
    ["import marlhf.b.x", "from marlhf.b.x import thing", "from marlhf.b import x, y",
     "def f():\n    from marlhf import b", "if TYPE_CHECKING:\n    import marlhf.b as other"],
)  # fmt: skip
def test_an_upward_import_is_noticed(line, tmp_path):
    for room in "ab":
        (tmp_path / "marlhf" / room).mkdir(parents=True)
        (tmp_path / "marlhf" / room / "__init__.py").write_text("")
    (tmp_path / "marlhf" / "a" / "y.py").write_text(line + "\n")
    (tmp_path / "marlhf" / "b" / "x.py").write_text("import os\nfrom marlhf.a import y\n")
    faults = upward_imports(tmp_path, "a\nb")
    assert {fault.split(" -> ")[0] for fault in faults} == {"marlhf.a.y"}
    assert upward_imports(tmp_path, "b\na") == ["marlhf.b.x -> marlhf.a.y"]


def missing_imports(path: Path, known: dict[str, Path]) -> list[str]:
    """Names that a file imports from the library, and that its modules do not have."""
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "marlhf":
            continue
        file = known.get(node.module or "")
        text = "" if file is None else file.read_text(encoding="utf-8")
        for alias in node.names:
            is_there = f"{node.module}.{alias.name}" in known
            if not is_there and not re.search(rf"\b{alias.name}\b", text):
                missing.append(f"{path.name}: {node.module}.{alias.name}")
    return missing


def test_what_scripts_import_exists():
    """No test runs benchmarks, and a rename must not break them unnoticed."""
    folders = ("benchmarks", "examples", "scripts")
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")]
    known = modules(SOURCE)
    assert [name for file in files for name in missing_imports(file, known)] == []


def test_an_import_of_what_is_gone_is_noticed(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from marlhf.rollout import generation\nfrom marlhf.data.order import Order\n")
    assert len(missing_imports(file, modules(SOURCE))) == 2


# Attributes that compat/ declares and whose names are too common to be refused elsewhere.
COMMON = {
    *("id", "layers", "is_initialized", "reorder_cache", "kwargs", "step", "tqdm", "method"),
    *("lora_bias", "get_base_layer"),  # also a key of LoraConfig, and a documented method
}

# The sandbox's program runs with the standard library alone, and ends as Python itself does.
EXCUSED = {"os._exit", "atexit._run_exitfuncs"}

NOT_DOCUMENTED = (
    *("datasets.config.", "huggingface_hub.constants.", "pydantic_core.", "tensorboard."),
)


def declared_attributes(compat: Path) -> set[str]:
    """Last parts of the names that compat/ declares to `needs`, but for common words."""
    text = "".join(file.read_text(encoding="utf-8") for file in compat.glob("*.py"))
    return set(re.findall(r'(?:\w:\w+\.|}\.)(\w+)[("]', text)) - COMMON


def is_private(name: str, declared: Collection[str]) -> bool:
    """Whether a name is private: `_fields` of named tuples and `__name__`s of Python are not."""
    hidden = r"_(?!fields$)[A-Za-z]\w*|__(wrapped|pydantic_\w+|compatible_ops)__"
    return name in declared or re.fullmatch(hidden, name) is not None


def private_names(path: Path, declared: Collection[str]) -> list[str]:
    """Private names of others that a module imports or uses, as "file:line name".

    An attribute counts also as the text of a `getattr`; those of `self` and `cls` do not.
    """
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        owner, attribute, full = None, "", []
        if isinstance(node, ast.Attribute):
            owner, attribute = node.value, node.attr
        elif isinstance(node, ast.Call) and re.fullmatch("(get|set|del|has)attr", text(node.func)):
            owner, attribute = node.args[0], str(getattr(node.args[1], "value", ""))
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        is_own = owner and text(owner) in OWN and not attribute.startswith("__")
        if owner and not is_own and is_private(attribute, declared):
            names.append(f"{path.name}:{node.lineno} {text(node)}")
        names += [
            f"{path.name}:{node.lineno} {name}"
            for name in full
            if f"{name}.".startswith(NOT_DOCUMENTED)
            or any(
                is_private(part, () if name.startswith("marlhf.") else declared)
                for part in name.split(".")
            )
        ]
    return names


OWN = ("self", "cls", "super()")
text = ast.unparse


def test_private_names_of_others_stand_in_compat_alone():
    declared = declared_attributes(SOURCE / "marlhf" / "compat")
    assert len(declared) > 25
    folders = (SOURCE, *(REPOSITORY / name for name in ("scripts", "examples")))
    files = [f for folder in folders for f in folder.rglob("*.py") if "compat" not in f.parts]
    names = [name for file in files for name in private_names(file, declared)]
    assert [name for name in names if name.split(" ")[1] not in EXCUSED] == []


@pytest.mark.parametrize(
    "line",
    ["torch._C", "import torch._dynamo", "from torch._subclasses import x", "from peft import _x",
     "getattr(layer, '_active_adapter')", "hasattr(layer, 'lora_A')", "layer.lora_A",
     "setattr(layer, '_x', 1)", "def f(self):\n    return self.model._x",
     "import datasets.config", "from datasets import config", "cls.__pydantic_fields__",
     "def f():\n    from pydantic_core import ArgsKwargs", "hasattr(p, 'ds_id')",
     "f.__wrapped__(1)", "from tensorboard.compat.proto import event_pb2",
     "from huggingface_hub import constants"],
)  # fmt: skip
def test_a_private_name_is_noticed(line, tmp_path):
    file = tmp_path / "x.py"
    file.write_text(line + "\n")
    assert len(private_names(file, declared_attributes(SOURCE / "marlhf" / "compat"))) == 1


def test_own_and_pythons_names_are_not_private(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("self._x, cls._y, x.__name__, getattr(self, '_z'), super()._w()\n")
    assert private_names(file, declared_attributes(SOURCE / "marlhf" / "compat")) == []


def test_first_sentences_of_docstrings_are_short():
    long = []
    for file in (SOURCE / "marlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = re.split(r"[.!?]\s|\n\n", ast.get_docstring(node) or "")[0]
                if len(re.findall(r"\S*\w\S*", first)) > 15:
                    long.append(f"{file.name}: {first}")
    assert long == []


def test_no_file_is_long():
    folders = ("src", "tests", "examples", "scripts", "benchmarks")
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")]
    lines = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert {str(f): n for f, n in lines.items() if n > 500} == {}
    assert lines[SOURCE / "marlhf" / "training" / "ppo.py"] < 350


@pytest.mark.parametrize(
    "words",
    [
        None,
        ["--help"],
        ["--version"],
        ["ppo", "--help"],
        ["evaluate", "--help"],
        ["quickstart", "--help"],
        ["segment", "--help"],
        ["report", "--help"],
        ["sweep", "--help"],
        ["estimate", "--help"],
    ],
    ids=lambda words: " ".join(words or ["import"]),
)
def test_start_up_loads_nothing_heavy(words):
    """The modules loaded are counted rather than the seconds, which depend on the machine."""
    program = (
        "import sys, marlhf\n"
        f"words = {words!r}\n"
        "if words:\n"
        "    from marlhf.cli import main\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.rpartition("LOADED")[2].split()
    assert HEAVY & set(loaded) == set()
    assert "marlhf" in loaded
