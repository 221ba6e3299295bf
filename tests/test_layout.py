"""The structure of the library: imports only go down, files stay short, start-up stays quick."""

import ast
import re
import subprocess
import sys
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
    algorithm models
    rewards
    data estimate
    runs
    rollout views
    evaluation training
    commands
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


def private_names(path: Path) -> list[str]:
    """Attributes that begin with one underscore, of anything but `self` and `cls`."""
    return [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and ast.unparse(node.value) not in ("self", "cls", "super()", "os", "sentence")
    ]


def test_private_names_of_others_stand_in_compat_alone():
    files = (f for f in SOURCE.rglob("*.py") if "compat" not in f.parts)
    names = [name for file in files for name in private_names(file)]
    # the sandbox's program runs with the standard library alone, and ends as Python itself does
    assert [name for name in names if "atexit._run_exitfuncs" not in name] == []


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
