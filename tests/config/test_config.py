"""Configurations: YAML, overrides, presets, help, and the way back to YAML."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, reject
from hypothesis import strategies as st
from support.bad_input import build_world
from support.strategies import fast

from marlhf.cli import main
from marlhf.common.errors import UserError, one_line
from marlhf.config import EvaluateConfig, MacroSettings, PPOConfig
from marlhf.config.loading import (
    apply_overrides,
    config_fields,
    config_from_dict,
    config_to_dict,
    load_config,
    merge,
    override,
    read_yaml,
)
from marlhf.config.sections import sampling_engine
from marlhf.config.yaml_text import dump_yaml, parse_yaml

REPOSITORY = Path(__file__).parents[2]
BASE = {"model": {"path": "lm"}}


def loaded(*overrides: str, **values: Any) -> PPOConfig:
    return config_from_dict(PPOConfig, apply_overrides(PPOConfig, BASE | values, overrides))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        (".5e+2", 50.0),
        ("+1e3", 1e3),
        ("1.e3", 1e3),
        ("1.0e-5", 1e-5),
        ("3", 3),
        ("0.1", 0.1),
        ("'1e-5'", "1e-5"),
        ("1e-5x", "1e-5x"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("null", None),
        ("true", True),
        ("[1e-5, 2]", [1e-5, 2]),
    ],
)
def test_numbers_in_yaml(text, value):
    found = parse_yaml(text, "here")
    assert (found, type(found)) == (value, type(value))


def test_a_key_given_twice_is_an_error_wherever_it_is():
    for text in ("a: 1\na: 2", "a: {b: 1, b: 2}", "a: [{b: 1, b: 2}]", "1: a\n'1': b"):
        with pytest.raises(UserError, match="is given twice"):
            parse_yaml(text, "here")


@pytest.mark.parametrize(
    "override",
    ["ppo.gamma=0.9", "critic.warmup_steps=2", "macro.value=last", "ppo.value_clip_range=null"],
)
def test_keys_of_the_critic_are_refused_where_there_is_none(override):
    loaded(override)
    with pytest.raises(UserError, match=r"ppo\.estimator=reinforce has no critic") as caught:
        loaded("ppo.estimator=reinforce", override)
    assert str(caught.value).startswith(override.split("=")[0])


def test_an_integer_serves_as_a_float():
    config = loaded("ppo.gamma=1", "kl.coef=0", "optimizer.betas=[0, 0.5]")
    assert config.ppo.gamma == 1
    assert config.optimizer.betas == [0, 0.5]


def test_overrides_of_every_type_and_depth(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: lm}\nppo: {lam: 0.5, epochs: 3}\n")
    config = load_config(
        PPOConfig,
        file,
        [
            "steps=7",
            "optimizer.learning_rate=1e-5",
            "reward.whiten=true",
            "reward.clip=2",
            "data.path=some/file.jsonl",
            'data.prompt_template="Summarize:\\n{document}"',
            "data.columns.prompt=question",
            "rollout.stop_strings=['\\n\\n', END]",
            "model.lora.r=4",
            "ppo.value_clip_range=null",
            "ppo.lam=0.9",
            "ppo.lam=0.8",
            "output_dir=a=b",
        ],
    )
    assert config.steps == 7
    assert config.optimizer.learning_rate == 1e-5
    assert config.reward.whiten is True
    assert config.reward.clip == 2
    assert config.data.path == "some/file.jsonl"
    assert config.data.prompt_template == "Summarize:\n{document}"
    assert config.data.columns == {"prompt": "question"}
    assert config.rollout.stop_strings == ["\\n\\n", "END"]
    assert config.model.lora is not None
    assert (config.model.lora.r, config.model.lora.alpha) == (4, 32)
    assert (config.ppo.lam, config.ppo.epochs) == (0.8, 3)  # the last counts; the file's stay
    assert config.ppo.value_clip_range is None
    assert config.output_dir == "a=b"


@pytest.mark.parametrize(
    ("written", "overrides", "segmenter"),
    [
        (None, ["segmenter.n=3"], {"name": "ngram", "n": 3}),
        ("parsing", ["segmenter.cutoff=3"], {"name": "parsing", "cutoff": 3}),
        ({"name": "ngram", "n": 3}, ["segmenter.n=4"], {"name": "ngram", "n": 4}),
        ({"name": "ngram", "n": 3}, ["segmenter=token"], "token"),
        ("ngram", ["segmenter={name: ngram, n: 2}"], {"name": "ngram", "n": 2}),
        ("ngram", ["segmenter=word", "segmenter.max_length=9"], {"name": "word", "max_length": 9}),
        ("ngram", ["segmenter.name=word"], {"name": "word"}),
    ],
)
def test_a_name_opens_up_into_a_mapping(written, overrides, segmenter):
    values = {} if written is None else {"segmenter": written}
    assert loaded(*overrides, **values).segmenter == segmenter


def test_a_reward_opens_up_as_well():
    given = {"models": "sentiment"}
    assert loaded("reward.models.weight=2", reward=given).reward.models == {
        "name": "sentiment",
        "weight": 2,
    }
    given = {"models": {"name": "length", "target": 3}}
    assert loaded("reward.models.target=5", reward=given).reward.models == {
        "name": "length",
        "target": 5,
    }


def test_overrides_leave_what_they_were_given_alone():
    values = {"model": {"path": "lm"}, "segmenter": {"name": "ngram"}}
    apply_overrides(PPOConfig, values, ["segmenter.n=3", "model.path=other", "steps=3"])
    assert values == {"model": {"path": "lm"}, "segmenter": {"name": "ngram"}}


def test_a_mapping_that_changes_its_name_replaces_the_one_below():
    below = {"s": {"name": "ngram", "n": 3}, "kl": {"coef": 1, "where": "loss"}, "x": 1}
    over = {"s": {"name": "token"}, "kl": {"coef": 2}, "x": {"y": 1}}
    assert merge(below, over) == {
        "s": {"name": "token"},
        "kl": {"coef": 2, "where": "loss"},
        "x": {"y": 1},
    }


def test_a_preset_lies_below_what_is_given():
    config = loaded("preset=paper_code", "reward.clip=1", "macro.value=last")
    assert config.reward.clip == 1
    assert (config.macro.value, config.macro.reward) == ("last", "mean")
    assert config.macro.discount == "per_macro"
    assert config.ppo.logprob_temperature == "one"
    for macro in ("macro=null", "macro=3"):
        with pytest.raises(UserError, match=r"macro: given .*, must be a mapping of keys"):
            loaded("preset=paper_code", macro)


def test_every_key_of_the_preset_is_a_key_of_the_configuration():
    preset = read_yaml(REPOSITORY / "src/marlhf/config/presets/paper_code.yaml")
    plain = config_to_dict(loaded("preset=paper_code"))
    for section, keys in preset.items():
        assert keys == {key: plain[section][key] for key in keys}


def test_a_preset_and_an_object_for_its_section_contradict():
    with pytest.raises(ValueError, match="macro: given as an object"):
        PPOConfig(model=config_model(), preset="paper_code", macro=MacroSettings())


def config_model() -> Any:
    return loaded().model


SHIPPED = [
    *(REPOSITORY / "configs").glob("ppo*.yaml"),
    *(REPOSITORY / "examples").glob("*.yaml"),
    REPOSITORY / "src/marlhf/views/assets/quickstart.yaml",
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_survives_the_way_to_yaml_and_back(path):
    config = load_config(PPOConfig, path)
    plain = yaml.safe_load(yaml.safe_dump(config_to_dict(config)))
    assert config_from_dict(PPOConfig, plain) == config


def test_a_resolved_configuration_with_a_preset_reads_back_the_same():
    config = loaded("preset=paper_code", "ppo.lam=0.5", "model.lora={}", "reward.clip=null")
    assert config_from_dict(PPOConfig, config_to_dict(config)) == config


def test_the_configuration_that_a_run_saves_makes_the_same_run(tmp_path, monkeypatch):
    world = build_world(tmp_path)
    monkeypatch.chdir(world)
    main(["ppo", "config.yaml", "segmenter.n=3", "optimizer.learning_rate=1e-3"])
    saved = Path("run/config.yaml")
    config = load_config(
        PPOConfig, "config.yaml", ["segmenter.n=3", "optimizer.learning_rate=1e-3"]
    )
    assert load_config(PPOConfig, saved) == config
    main(["ppo", str(saved), "output_dir=again"])

    def scores(run: str) -> list[Any]:
        rows = Path(run, "metrics.jsonl").read_text().splitlines()
        return [(json.loads(r)["score_mean"], json.loads(r)["policy_loss"]) for r in rows]

    assert scores("run") == scores("again")


HELP_LINE = re.compile(r"^  (\S+)  \((.+)\)$")


@pytest.fixture
def help_text(capsys) -> str:
    main(["ppo", "--help"])
    return capsys.readouterr().out


def leaves(cls: Any, prefix: str = "") -> list[str]:
    """Every key of a dataclass by Python's own means, independent of `config_fields`."""
    found = []
    for field in fields(cls):
        section = cls.__pydantic_fields__[field.name].annotation
        parts = [p for p in (section, *getattr(section, "__args__", ())) if isinstance(p, type)]
        nested = [p for p in parts if is_dataclass(p)]
        found.append(prefix + field.name)
        found += leaves(nested[0], f"{prefix}{field.name}.") if nested else []
    return found


def test_help_lists_every_key_once_with_type_default_and_meaning(help_text):
    lines = help_text.splitlines()
    heads = [i for i, line in enumerate(lines) if HELP_LINE.match(line)]
    keys = [HELP_LINE.match(lines[i])[1] for i in heads]
    assert sorted(keys) == sorted(leaves(PPOConfig))
    for i in heads:
        _, what = HELP_LINE.match(lines[i]).groups()
        assert what.startswith("section") or "default " in what or what.endswith("required")
        assert lines[i + 1].startswith("      ")
        assert lines[i + 1].strip()
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "line",
    [
        "model.path  (text, required)",
        "model.lora.r  (int >=1, default 16)",
        "ppo.gamma  (float >=0 <=1, default 1.0)",
        "rollout.temperature  (float >0, default 1.0)",
        "reward.clip  (float >0 or null, default null)",
        "optimizer.betas  (list of float >=0 <1, 2 of them, default [0.9, 0.95])",
        'ppo.estimator  (text or mapping, default "gae")',
        "data.shuffle  (true|false, default true)",
        "data.columns  (mapping, default {})",
        'segmenter  (text or mapping, default "ngram")',
        "steps  (int >=1, default 100)",
        "seed  (int, default 0)",
    ],
)
def test_help_shows_types_bounds_and_defaults(line, help_text):
    assert f"\n  {line}\n" in help_text


OPTIONAL_SECTIONS = (
    "model.lora.",
    "model.quantization.",
    "ptx.",
    "rollout.importance.",
)  # null unless one of their keys is given


def test_defaults_in_help_are_accepted_as_overrides():
    for field in config_fields(PPOConfig):
        if field.default not in ("", "required") and not field.key.startswith(OPTIONAL_SECTIONS):
            assert loaded(f"{field.key}={field.default}") == loaded()


TEXT = "ab1 é🙂\"'{}[]:#%&*!|>-?,@\n\t"
SCALARS = {
    "text": st.text(TEXT, min_size=1, max_size=8),
    "mapping": st.just({}),
    "true|false": st.booleans(),
    "int": st.integers(-9, 9),
    "list of text": st.lists(st.text(TEXT, min_size=1, max_size=4), max_size=3),
    "list of float": st.lists(st.floats(0, 0.99), min_size=2, max_size=2),
    "text or list of text": st.sampled_from(["all-linear", ["q_proj"]]),
    "text or mapping": st.sampled_from(["word", {"name": "ngram", "n": 3}]),
    "text or mapping or list of text or mapping": st.sampled_from(["a", {"name": "b"}, ["c"]]),
}


def values_of(kind: str) -> st.SearchStrategy[Any]:
    """Valid values of a key, from its type in the help."""
    if kind.endswith(" or null"):
        return st.none() | values_of(kind.removesuffix(" or null"))
    if kind.startswith("list of") and "|" in kind:
        choices = kind.removeprefix("list of ").split("|")
        return st.lists(st.sampled_from(choices), max_size=3)
    if "|" in kind and kind != "true|false":
        return st.sampled_from(kind.split("|"))
    kind, *bounds = re.split(r" (?=[<>])", kind)
    if not bounds or kind not in ("int", "float"):
        return SCALARS[kind]
    if kind == "float" and bounds[0] in (">1", ">=1"):
        return st.floats(1.1, 9.0)
    return st.integers(1, 9) if kind == "int" else st.floats(0.1, 0.9) | st.just(1e-5)


# these depend on others, or on files
CROSSED = {"preset", "ppo.minibatches", "ppo.estimator", "rollout.min_new_tokens", "critic.path"}
CROSSED |= {"kl.target", "kl.horizon", "ppo.target_kl", "ppo.redraw_minibatches"}
CROSSED |= {f"data.{key}" for key in ("preset", "part", "part_seed", "min_good_rows")}
CROSSED |= {f.key for f in config_fields(PPOConfig) if f.key.startswith("ptx.")}
CROSSED |= {
    "model.quantization.bits",
    "resume",
    "critic.coef",
    "data.template_date",
    "rollout.ahead",
}
FREE = [f for f in config_fields(PPOConfig) if f.type != "section" and f.key not in CROSSED]


@fast
@given(data=st.data(), chosen=st.lists(st.sampled_from(FREE), unique=True, max_size=6))
def test_any_valid_overrides_survive_the_way_to_yaml_and_back(data, chosen):
    wanted = {f.key: data.draw(values_of(f.type), label=f.key) for f in chosen}
    overrides = [f"{key}={json.dumps(value)}" for key, value in wanted.items()]
    try:
        config = loaded(*overrides)
    except UserError:  # each is valid, but not together
        for override in overrides:
            loaded(override)
        reject()
    for key, value in wanted.items():
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value
    text = dump_yaml(config_to_dict(config))
    assert config_from_dict(PPOConfig, yaml.safe_load(text)) == config
    assert config_from_dict(PPOConfig, parse_yaml(text, "here")) == config


@pytest.mark.parametrize(
    ("engine", "kept"),
    [
        ("vllm", "vllm"),
        ({"name": "transformers", "batch_size": 3}, "transformers"),
        ({"name": "vllm", "address": ["http://a"], "on_failure": "continue"}, "vllm"),
        ({"name": "vllm", "dtype": "bfloat16"}, {"name": "vllm", "dtype": "bfloat16"}),
        ({"name": "my.Engine", "address": "a"}, {"name": "my.Engine", "address": "a"}),
    ],
)
def test_arguments_of_engines_that_change_no_sample(engine, kept):
    assert sampling_engine(engine) == kept


def test_configurations_are_frozen_and_replaceable():
    config = loaded()
    with pytest.raises(AttributeError):
        config.steps = 3  # pyright: ignore
    assert replace(config, steps=3).steps == 3


def test_one_line():
    assert one_line("a\n\n  b\tc") == "a b c"
    assert one_line("x" * 20, 10) == "x" * 7 + "..."
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("a\nb")) == "a b"


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("preset", "x" * 5000, ["preset: given 'xxx", "must be 'paper_code'"]),
        ("k" * 5000, 1, ["kkk", "unknown key", "rollout, seed, segmenter, steps"]),
        ("data", {"template_date": "x" * 5000}, ["data.template_date: given 'x", "YYYY-MM-DD"]),
        (
            "reward",
            {"models": [1] * 5000},
            ["reward.models: given [1, 1", "a mapping of keys or a"],
        ),
        ("steps", nested(300), ["config: lists and mappings in it are nested too deeply"]),
    ],
    ids=["preset", "key", "date", "list", "deep"],
)
def test_long_and_deep_values_leave_a_short_line(key, value, fragments):
    with pytest.raises(UserError) as error:
        config_from_dict(PPOConfig, {"model": {"path": "x"}, key: value})
    assert len(str(error.value)) < 800
    for fragment in fragments:
        assert fragment in str(error.value)


def test_a_long_override_leaves_a_short_line():
    for assignment in ("steps=" + "9" * 5000, "x" * 5000, "steps.x=" + "9" * 5000):
        with pytest.raises(UserError) as error:
            override({"steps": "x" * 5000}, assignment)
        assert str(error.value).startswith(f"override '{assignment[:6]}")
        assert len(str(error.value)) < 300


def test_a_section_names_its_key():
    with pytest.raises(UserError, match=r"^judge\.url: must begin with http"):
        config_from_dict(EvaluateConfig, {"policies": "x", "judge": {"url": "x", "model": "m"}})
