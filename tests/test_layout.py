"""The structure of the library: imports only go down, files stay short, start-up stays quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / "src"

# A module imports only modules above it. A package comes after its modules, as it may import them.
ORDER = [
    "marlhf.errors",
    "marlhf.paths",
    "marlhf.lines",
    "marlhf.signals",
    "marlhf.quiet",
    "marlhf.tokenization",
    "marlhf.types",
    "marlhf.chat_templates",
    "marlhf.plugins",
    "marlhf.registry",
    "marlhf.yaml_text",
    "marlhf.config_loading",
    "marlhf.config.sections",
    "marlhf.config.evaluate",
    "marlhf.config.ppo",
    "marlhf.config.sft",
    "marlhf.config.reward",
    "marlhf.config.sweep",
    "marlhf.config",
    "marlhf.checkpoint",
    "marlhf.state_files",
    "marlhf.distributed.profile",
    "marlhf.distributed.trained",
    "marlhf.distributed.ranks",
    "marlhf.distributed",
    "marlhf.segmenters.base",
    "marlhf.segmenters.ngram",
    "marlhf.segmenters.perplexity",
    "marlhf.segmenters.entropy",
    "marlhf.segmenters.phrases",
    "marlhf.segmenters.offsets",
    "marlhf.segmenters.text",
    "marlhf.segmenters.parsing",
    "marlhf.segmenters",
    "marlhf.macro",
    "marlhf.advantages",
    "marlhf.losses",
    "marlhf.calibration",
    "marlhf.kl_control",
    "marlhf.experience",
    "marlhf.batching",
    "marlhf.models",
    "marlhf.packing",
    "marlhf.generation",
    "marlhf.gate",
    "marlhf.adapters",
    "marlhf.loading",
    "marlhf.critics",
    "marlhf.classifier",
    "marlhf.jail.kernel",
    "marlhf.jail.scratch",
    "marlhf.jail.values",
    "marlhf.jail.peer",
    "marlhf.jail.testing",
    "marlhf.jail.program",
    "marlhf.jail.server",
    "marlhf.jail",
    "marlhf.rewards.calls",
    "marlhf.rewards.base",
    "marlhf.rewards.model",
    "marlhf.rewards.text",
    "marlhf.rewards.reference",
    "marlhf.rewards.sandbox",
    "marlhf.rewards.code",
    "marlhf.rewards.segments",
    "marlhf.rewards.tokens",
    "marlhf.rewards.curiosity",
    "marlhf.rewards",
    "marlhf.sharded_base",
    "marlhf.file_formats",
    "marlhf.tables",
    "marlhf.provenance",
    "marlhf.data_presets.base",
    "marlhf.data_presets.summaries",
    "marlhf.data_presets.dialogues",
    "marlhf.data_presets.webgpt",
    "marlhf.data_presets.apps",
    "marlhf.data_presets.parts",
    "marlhf.data_presets",
    "marlhf.conversations",
    "marlhf.data",
    "marlhf.template_checks",
    "marlhf.demonstrations",
    "marlhf.preferences",
    "marlhf.metrics",
    "marlhf.watch",
    "marlhf.run_directory",
    "marlhf.run_state",
    "marlhf.rollout",
    "marlhf.ptx",
    "marlhf.objectives",
    "marlhf.learner",
    "marlhf.display",
    "marlhf.diagnostics",
    "marlhf.update",
    "marlhf.ppo",
    "marlhf.supervised",
    "marlhf.sft",
    "marlhf.reward_model",
    "marlhf.evaluation.statistics",
    "marlhf.evaluation.records",
    "marlhf.evaluation.policies",
    "marlhf.evaluation.bench",
    "marlhf.evaluation.sampling",
    "marlhf.evaluation.scoring",
    "marlhf.evaluation.summary",
    "marlhf.evaluation.tables",
    "marlhf.evaluation.endpoint",
    "marlhf.evaluation.judge",
    "marlhf.evaluation.raters",
    "marlhf.evaluation.preferences",
    "marlhf.evaluation",
    "marlhf.evaluate",
    "marlhf.merge_command",
    "marlhf.quickstart",
    "marlhf.page",
    "marlhf.charts",
    "marlhf.inspector",
    "marlhf.inspector_page",
    "marlhf.segment_command",
    "marlhf.report.runs",
    "marlhf.report.groups",
    "marlhf.report.figures",
    "marlhf.report.samples",
    "marlhf.report.document",
    "marlhf.report.png",
    "marlhf.report.command",
    "marlhf.report",
    "marlhf.sweep",
    "marlhf.memory",
    "marlhf.fake_passes",
    "marlhf.estimate_command",
    "marlhf.cli",
    "marlhf.__main__",
    "marlhf",
]

HEAVY = {
    *("accelerate", "datasets", "deepspeed", "matplotlib", "nltk", "numpy", "pandas", "peft"),
    *("pyarrow", "safetensors", "spacy", "tensorboard", "tokenizers", "torch", "transformers"),
}


def modules(source: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the library."""
    files = sorted((source / "marlhf").rglob("*.py"))
    names = [".".join(f.relative_to(source).with_suffix("").parts) for f in files]
    return dict(zip((n.removesuffix(".__init__") for n in names), files, strict=True))


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the library that a module imports anywhere, also inside functions.

    `from marlhf import data` is an import of `marlhf.data`; `from marlhf import PPOTrainer` one of
    `marlhf`, which only users do; the version is a constant and counts as none.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if full != "marlhf.__version__":
                    found.add(full if full in known else module)
    return {name for name in found if name.split(".")[0] in ("marlhf", "")}


def upward_imports(source: Path, order: list[str]) -> list[str]:
    """Every import that does not point up the list, as "importer -> imported"."""
    known = modules(source)
    faults = []
    for name, path in known.items():
        above = order[: order.index(name)]
        found = imports(ast.parse(path.read_text(encoding="utf-8")), set(known))
        faults += [f"{name} -> {module}" for module in sorted(found) if module not in above]
    return faults


def test_every_module_has_its_place_in_the_order():
    assert sorted(modules(SOURCE)) == sorted(ORDER)


def test_modules_import_only_modules_above_them():
    assert upward_imports(SOURCE, ORDER) == []


@pytest.mark.parametrize(
    "line",
    [
        "import marlhf.b",
        "from marlhf.b import thing",
        "from marlhf import b",
        "from marlhf import Thing",
        "from . import b",
        "from .b import thing",
        "def f():\n    from marlhf.b import thing",
        "if TYPE_CHECKING:\n    import marlhf.b as other",
    ],
)
def test_an_upward_import_is_found(line, tmp_path):
    package = tmp_path / "marlhf"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(line + "\n")
    (package / "b.py").write_text("import os, torch\nfrom marlhf import a, __version__\n")
    faults = upward_imports(tmp_path, ["marlhf.a", "marlhf.b", "marlhf"])
    assert [fault.split(" -> ")[0] for fault in faults] == ["marlhf.a"]


def test_no_file_is_long():
    folders = ("src", "tests", "examples", "scripts", "benchmarks")
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")]
    lines = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert {str(f): n for f, n in lines.items() if n > 500} == {}
    assert lines[SOURCE / "marlhf" / "ppo.py"] < 350


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
