"""Malformed configurations, overrides, commands and plug-ins: a clear line each, status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.bad_input import CONFIG, Refusals, build_world, cases

from marlhf.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def refused(world: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Refusals:
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    return Refusals(world, capfd, monkeypatch)


def test_the_configuration_that_the_cases_break_works(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    main(["ppo", "config.yaml", f"output_dir={tmp_path / 'fine'}"])
    assert (tmp_path / "fine" / "final" / "model.safetensors").exists()


KEYS = """
modle.path=x -> modle: unknown key & did you mean 'model'? & Possible: checkpoint, critic
step=3 -> step: unknown key & did you mean 'steps'?
--steps=3 -> --steps: unknown key & did you mean 'steps'?
1=2 -> 1: unknown key
model.pth=x -> model.pth: unknown key & did you mean 'path'? & chat_template
model.lora.rank=3 -> model.lora.rank: unknown key & alpha, extra, r, target_modules
critic.warmup=3 -> critic.warmup: unknown key & did you mean 'warmup_steps'?
data.paht=x -> data.paht: unknown key & did you mean 'path'?
rollout.temprature=1 -> rollout.temprature: unknown key & did you mean 'temperature'?
reward.model=x -> reward.model: unknown key & did you mean 'models'?
kl.coeff=1 -> kl.coeff: unknown key & did you mean 'coef'? & where
macro.whitening=none -> macro.whitening: unknown key & did you mean 'whiten'?
ppo.lambda=1 -> ppo.lambda: unknown key & did you mean 'lam'?
optimizer.lr=1 -> optimizer.lr: unknown key & learning_rate
log.eval_evry=1 -> log.eval_evry: unknown key & did you mean 'eval_every'?
steps=ten -> steps: given 'ten', must be a whole number
steps=1.5 -> steps: given 1.5, must be a whole number
steps=true -> steps: given true, must be a whole number
steps="3" -> steps: given '3', must be a whole number
steps= -> steps: given null, must be a whole number
steps=2000-01-01 -> steps: given '2000-01-01', must be a whole number
steps=0 -> steps: given 0, must be at least 1
steps=99999999999999999999 -> steps: given 99999999999999999999, must be below 2147483648
seed=1.5 -> seed: given 1.5, must be a whole number
seed=99999999999999999999 -> seed: given 99999999999999999999, must be below 9223372036854775808
overwrite=maybe -> overwrite: given 'maybe', must be true or false
overwrite=1 -> overwrite: given 1, must be true or false
output_dir=3 -> output_dir: given 3, must be a text
output_dir="" -> output_dir: given '', must be a text that is not empty
preset=paper -> preset: given 'paper', must be 'paper_code'
preset=../quickstart -> preset: given '../quickstart', must be 'paper_code'
preset={} -> preset: given {}, must be 'paper_code'
preset=reference -> preset: 'reference' is called 'paper_code' now
critic.trunk=own -> critic.trunk: is called critic.backbone now
model=x -> model: given 'x', must be a mapping of keys
model=[] -> model: given [], must be a mapping of keys
model={} -> model.path: missing; it must be given (A hub name
model.path=3 -> model.path: given 3, must be a text
model.path=[lm] -> model.path: given ["lm"], must be a text
model.path="" -> model.path: given '', must be a text that is not empty
model.revision=4 -> model.revision: given 4, must be a text
model.precision=fp16 -> model.precision: given 'fp16', must be 'fp32', 'tf32' or 'bf16'
model.quantization.bits=4 -> model.quantization: given bits=4 without model.lora
model.quantization.bits=8 -> model.quantization.bits: given 8, must be 4
offload=[critic] -> offload: given 'critic', must be 'reference', 'reward' or 'optimizer'
model.trust_remote_code=yep -> model.trust_remote_code: given 'yep', must be true or false
model.lora=true -> model.lora: given true, must be a mapping of keys
model.lora.r=0 -> model.lora.r: given 0, must be at least 1
model.lora.alpha=-1 -> model.lora.alpha: given -1, must be above 0
model.lora.target_modules=3 -> model.lora.target_modules: given 3, must be a list or a text
model.lora.extra=3 -> model.lora.extra: given 3, must be a mapping of keys
critic=null -> critic: given null, must be a mapping of keys
critic.init=random -> critic.init: given 'random', must be 'auto', 'policy' or 'reward'
critic.init=reward -> critic.init: given 'reward', but reward.models has no reward model
critic.warmup_steps=-1 -> critic.warmup_steps: given -1, must be at least 0
critic.backbone=shared -> critic.backbone: given 'shared', must be 'own' or 'policy'
critic.coef=0.2 -> critic.coef: given 0.2, but a critic with its own backbone has a step
critic.backbone=policy ;; critic.init=reward -> critic.init: given 'reward', but with critic.
critic.backbone=policy ;; critic.warmup_steps=2 -> critic.warmup_steps: given 2, but with
critic.backbone=policy ;; optimizer.critic_learning_rate=0.1 -> optimizer.critic_learning_rate: 
critic.path=rm ;; critic.init=policy -> critic.init: given 'policy' with critic.path
data=data.jsonl -> data: given 'data.jsonl', must be a mapping of keys
data.columns=[a] -> data.columns: given ["a"], must be a mapping of keys
data.columns={a: 3} -> data.columns: given 3, must be a text
data.limit=0 -> data.limit: given 0, must be at least 1
data.limit=many -> data.limit: given 'many', must be a whole number
data.eval_rows=-1 -> data.eval_rows: given -1, must be at least 0
data.shuffle=3 -> data.shuffle: given 3, must be true or false
data.prompt_template={prompt} -> data.prompt_template: given {"prompt": null}, must be a text
rollout=null -> rollout: given null, must be a mapping of keys
rollout.batch_size=0 -> rollout.batch_size: given 0, must be at least 1
rollout.batch_size=1e3 -> rollout.batch_size: given 1000.0, must be a whole number
rollout.responses_per_prompt=0 -> rollout.responses_per_prompt: given 0, must be at least 1
rollout.max_prompt_length=0 -> rollout.max_prompt_length: given 0, must be at least 1
rollout.max_new_tokens=0 -> rollout.max_new_tokens: given 0, must be at least 1
rollout.max_new_tokens=250 -> rollout.max_new_tokens: given 250 & 13 tokens & the 256 positions
rollout.min_new_tokens=6 -> rollout.min_new_tokens: given 6 & rollout.max_new_tokens=5
rollout.temperature=0 -> rollout.temperature: given 0, must be above 0
rollout.temperature=hot -> rollout.temperature: given 'hot', must be a number
rollout.temperature=.nan -> rollout.temperature: given NaN, must be a finite number
rollout.temperature=1e400 -> rollout.temperature: given Infinity, must be a finite number
rollout.top_p=0 -> rollout.top_p: given 0, must be above 0
rollout.top_p=1.1 -> rollout.top_p: given 1.1, must be at most 1
rollout.top_k=-1 -> rollout.top_k: given -1, must be at least 0
rollout.stop_strings=x -> rollout.stop_strings: given 'x', must be a list
rollout.stop_strings=[1] -> rollout.stop_strings: given 1, must be a text
rollout.stop_strings=[""] -> rollout.stop_strings: given '', must be a text that is not empty
reward.tokens=curiousity -> token reward: no token reward is called 'curiousity'; did you mean
reward.tokens={name: curiosity, topk: 2} -> token reward curiosity: given topk; its parameters are
reward.tokens={name: curiosity, top_k: -1} -> token reward curiosity: top_k: given -1, must be at
reward.tokens={name: curiosity, width: 0} -> token reward curiosity: width: given 0, must be at
reward.tokens={name: curiosity, memory: 1.0} -> token reward curiosity: memory: given 1.0 & below 1
reward.tokens={name: curiosity, learning_rate: 0.0} -> learning_rate: given 0.0, must be above 0
reward.tokens={name: curiosity, seed: x} -> token reward curiosity: seed: given 'x'
reward.tokens={name: curiosity, weight: x} -> reward: weight: given 'x', must be a finite number
reward.tokens=faulty.fine -> token reward fine: given <function & subclass of marlhf.rewards.TokenR
reward.tokens=3 -> reward.tokens: given 3, must be a list or a mapping of keys or a text
reward.clip=0 -> reward.clip: given 0, must be above 0
reward.missing_eos_penalty=-1 -> reward.missing_eos_penalty: given -1, must be at least 0
kl=0.1 -> kl: given 0.1, must be a mapping of keys: coef, horizon, target, where
kl.coef=-1 -> kl.coef: given -1, must be at least 0
kl.target=0 -> kl.target: given 0, must be above 0
kl.horizon=0 -> kl.horizon: given 0, must be at least 1
kl.where=nowhere -> kl.where: given 'nowhere', must be 'auto', 'reward' or 'loss'
macro.value=mean -> macro.value: given 'mean', must be 'equal', 'position', 'last' or 'first'
macro.discount=0.9 -> macro.discount: given 0.9, must be 'per_token' or 'per_macro'
macro.whiten=false -> macro.whiten: given false, must be 'auto', 'macro', 'token' or 'none'
ppo.estimator=ppo -> no estimator is called 'ppo' & gae, grpo, monte_carlo, prefix_tree, reinforce
ppo.estimator=grpo -> rollout.responses_per_prompt: given 1 & at least 2 for ppo.estimator=grpo
ppo.gamma=1.5 -> ppo.gamma: given 1.5, must be at most 1
ppo.lam=-0.1 -> ppo.lam: given -0.1 & at least 0
ppo.clip_range=0 -> ppo.clip_range: given 0 & above 0
ppo.value_clip_range=x -> ppo.value_clip_range: given 'x', must be a number
ppo.target_kl=0 -> ppo.target_kl: given 0, must be above 0
ppo.epochs=0 -> ppo.epochs: given 0, must be at least 1
ppo.minibatches=3 -> ppo.minibatches: given 3, must divide rollout.batch_size=4
ptx.coef=1 -> ptx.path: missing; it must be given
ptx.path=no.jsonl -> ptx.path: given 'no.jsonl', which does not exist
ptx.path=data.jsonl -> ptx.text_column: no column is called 'text'; the data has prompt, summary
ptx={path: data.jsonl, text_column: prompt} -> ptx.max_length: given 512, must not exceed
ptx={path: data.jsonl, coef: 0} -> ptx.coef: given 0, must be above 0
ptx={path: data.jsonl, max_length: 1} -> ptx.max_length: given 1, must be at least 2
optimizer.learning_rate=1e-5x -> optimizer.learning_rate: given '1e-5x', must be a number
optimizer.learning_rate=-1 -> optimizer.learning_rate: given -1, must be at least 0
optimizer.schedule=poly -> optimizer.schedule: given 'poly', must be 'linear', 'cosine'
optimizer.betas=0.9 -> optimizer.betas: given 0.9, must be a list
optimizer.betas=[0.9] -> optimizer.betas: given [0.9], must be a list of at least 2
optimizer.betas=[0.9, 0.9, 0.9] -> given [0.9, 0.9, 0.9], must be a list of at most 2
optimizer.betas=[0.9, 1] -> optimizer.betas: given 1, must be below 1
optimizer.eps=0 -> optimizer.eps: given 0, must be above 0
optimizer.max_grad_norm=0 -> optimizer.max_grad_norm: given 0, must be above 0
log.samples=-1 -> log.samples: given -1, must be at least 0
log.tensorboard=2 -> log.tensorboard: given 2, must be true or false
nonsense -> override 'nonsense': must look like key.sub=value
=3 -> override '=3': must look like key.sub=value
steps..x=3 -> override 'steps..x=3': must look like key.sub=value
--steps 3 -> override '--steps 3': must look like key.sub=value
steps.x=3 -> override 'steps.x=3': 'steps' is 1 and has no sub-keys
model.path.x=3 -> override 'model.path.x=3': 'path' is 'lm' and has no sub-keys
steps=[1 -> override 'steps=[1' & not valid YAML
steps="1 -> override 'steps="1' & not valid YAML
model.path=!!python/name:os.system -> override & not valid YAML & python/name
"""


@pytest.mark.parametrize(("overrides", "fragments"), cases(KEYS))
def test_a_wrong_key_or_value(overrides, fragments, refused):
    line = refused.of(*overrides)
    for fragment in fragments:
        assert fragment in line


FILES = {
    "empty": ("", "model.path: missing; it must be given"),
    "null": ("null", "model.path: missing"),
    "a list": ("- a\n- b\n", "must hold `key: value` lines, holds a list"),
    "a text": ("just text", "must hold `key: value` lines, holds 'just text'"),
    "a number": ("3", "must hold `key: value` lines, holds 3"),
    "open bracket": ("model: [1\n", "line 2: not valid YAML: expected ',' or ']'"),
    "bad indentation": ("model:\n  path: x\n path: y\n", "line 3: not valid YAML"),
    "tab": ("model:\n\tpath: x\n", "line 2: not valid YAML: found character '\\t'"),
    "base sixty": (
        CONFIG.replace("s: 1", "s: 1:30"),
        "steps: given '1:30', must be a whole",
    ),
    "underscores": (CONFIG.replace("s: 1", "s: 1_0"), "steps: given '1_0', must be a whole"),
    "a word of old": (CONFIG + "overwrite: no\n", "line 9: not valid YAML: no means true or false"),
    "a key of old": ("on: {path: x}\n", "line 1: not valid YAML: on means true or false"),
    "a tag of old": (
        "model: !!binary aGV5",
        "line 1: not valid YAML: could not determine",
    ),
    "half a character": ('model: "\\ud800"', "line 1: not valid YAML: a text holds half of a char"),
    "a merge of nothing": ("model: {<<: 3}", "line 1: not valid YAML: expected a mapping or list"),
    "two merges": ("a: &a {}\nb: {<<: *a, <<: *a}", "line 2: not valid YAML: key '<<' is given"),
    "two colons": ("a: b: c", "line 1: not valid YAML: mapping values are not allowed here"),
    "no such anchor": ("model: *x", "line 1: not valid YAML: found undefined alias 'x'"),
    "tag": ("model: !policy x", "line 1: not valid YAML: could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2: not valid YAML"),
    "list as key": ("? [1]\n: 3\n", "line 1: not valid YAML: a key must be a text"),
    "too deep": ("x: " + "[" * 2000, "not valid YAML: nested too deeply"),
    "holds itself": ("model: &m {path: *m}", "line 1: not valid YAML: it holds itself"),
    "a date as key": (CONFIG + "2000-01-01: 3\n", "2000-01-01: unknown key; Possible: checkpoint"),
    "control character": ("a\0b", "not valid YAML: unacceptable character"),
    "key twice": (CONFIG + "steps: 2\n", "line 9: not valid YAML: key 'steps' is given twice"),
    "sub-key twice": ("kl:\n  coef: 1\n  coef: 2\n", "line 3: not valid YAML: key 'coef'"),
    "a number as key": (CONFIG + "1: 2\n", "1: unknown key; Possible: checkpoint"),
    "dotted key": (CONFIG + "data.limit: 2\n", "data.limit: unknown key; Possible: checkpoint"),
    "no value": (CONFIG.replace("steps: 1", "steps:"), "steps: given null, must be a whole number"),
    "octal": (CONFIG.replace("path: lm", "path: 0777"), "model.path: given 777, must be a text"),
    "binary": (b"\x00\x01\xff\xfe", "config file 'broken.yaml' is not UTF-8 text"),
    "UTF-16": ("steps: 3".encode("utf-16"), "config file 'broken.yaml' is not UTF-8 text"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_config_file(name, refused):
    content, fragment = FILES[name]
    content = content.encode() if isinstance(content, str) else content
    Path("broken.yaml").write_bytes(content)
    line = refused("ppo", "broken.yaml")
    assert fragment in line
    assert "broken.yaml" in line or "not valid YAML" not in line


COMMANDS = """
tune -> no job is called 'tune'; possible: & ppo, & quickstart
Ppo ;; config.yaml -> no job is called 'Ppo'; possible: & ppo, & quickstart
--verson -> no job is called '--verson'
ppo -> usage: marlhf ppo CONFIG.yaml [key.sub=value ...]
ppo ;; steps=3 -> usage: marlhf ppo CONFIG.yaml
ppo ;; missing.yaml -> config file 'missing.yaml' does not exist
ppo ;; --config ;; config.yaml -> config file '--config' does not exist
ppo ;; empty_folder -> config file 'empty_folder' cannot be read: Is a directory
ppo ;; lm/model.safetensors -> config file 'lm/model.safetensors' is not UTF-8 text
quickstart ;; --stepps ;; 3 -> quickstart: unrecognized arguments: --stepps & --help
quickstart ;; --steps ;; x -> quickstart: argument --steps: invalid int value: 'x'
quickstart ;; --steps ;; 0 ;; --model ;; lm -> steps: given 0, must be at least 1
quickstart ;; --model ;; ./nowhere -> model.path: given './nowhere', which does not exist
quickstart ;; --model ;; lm ;; --segmenter ;; ngran -> did you mean 'ngram'?
quickstart ;; --model ;; lm ;; --segmenter ;; {name: ngram -> override & not valid YAML
quickstart ;; --model ;; lm ;; stepps=3 -> stepps: unknown key; did you mean 'steps'?
"""


@pytest.mark.parametrize(("words", "fragments"), cases(COMMANDS))
def test_a_wrong_command(words, fragments, refused):
    line = refused(*words)
    for fragment in fragments:
        assert fragment in line


PLUGINS = """
segmenter=ngran -> no segmenter is called 'ngran'; did you mean 'ngram'? & line, ngram, parsing
segmenter=trigram -> no segmenter is called 'trigram' & or an import path such as
segmenter="" -> no segmenter is called ''
segmenter=3 -> segmenter: given 3, must be a mapping of keys or a text
segmenter=null -> segmenter: given null, must be
segmenter={n: 3} -> segmenter: given {'n': 3}, but a mapping needs a `name`
segmenter={name: 3} -> segmenter: given {'name': 3}, but a mapping needs a `name`, a text
segmenter.m=3 -> segmenter ngram: given n, m; its parameters are n, max_length
segmenter.n=0 -> segmenter ngram: n: given 0, must be at least 1
segmenter.n=x -> segmenter ngram: n: given 'x', must be a whole number
segmenter.n=2.0 -> segmenter ngram: n: given 2.0, must be a whole number
segmenter.max_length=0 -> segmenter ngram: max_length: given 0, must be at least 1
segmenter={name: random_ngram, lengths: []} -> random_ngram: lengths: given []
segmenter={name: random_ngram, lengths: [a]} -> lengths: given ['a'], must be a whole number
segmenter={name: random_ngram, lengths: 3} -> lengths: given 3, must be a list
segmenter={name: perplexity, logprobs: critic} -> given 'critic', must be 'ref' or 'policy'
segmenter={name: union} -> segmenter union: given no argument; its parameters are of
segmenter={name: union, of: []} -> segmenter union: of: given [], must be a list of segmenters
segmenter={name: union, of: [ngran]} -> segmenter union: segmenter: no segmenter is called 'ngran'
segmenter={name: union, of: [{name: ngram, m: 1}]} -> segmenter union: segmenter ngram: given m
segmenter={name: word, language: xx9} -> segmenter word: language: cannot use spaCy's 'xx9'
segmenter={name: parsing, cutoff: 0} -> segmenter parsing: cutoff: given 0
segmenter={name: parsing, parser: mine} -> parser: given 'mine', must be 'spacy', 'stanza' or
segmenter={name: parsing, parser: faulty.NUMBER} -> segmenter parsing: parser: given 3
segmenter={name: parsing, pipeline: no_such} -> pipeline: spaCy's 'no_such' is not installed
segmenter=not_there.Segmenter -> cannot import 'not_there.Segmenter': No module named 'not_there'
segmenter=faulty.Missing -> segmenter: module 'faulty' has no 'Missing'
segmenter=faulty.torch -> segmenter: 'faulty.torch' is a module; name a callable in it
ppo.estimator=marlhf.algorithm -> is a module; name a callable in it: marlhf.algorithm.Name
reward.models=xml.dom.pulldom -> reward: 'xml.dom.pulldom' is a module; name a callable
reward.models=xml.no_such -> reward: module 'xml' has no 'no_such'
segmenter=raises_on_import.x -> 'raises_on_import.x': raised OSError: the disk is on fire
segmenter=needs_missing.x -> No module named 'a_package_that_is_not_there'
segmenter=syntax_error.f -> cannot import 'syntax_error.f': raised SyntaxError
segmenter=exits.f -> cannot import 'exits.f': raised SystemExit
segmenter=.relative -> segmenter: '.relative' is not an import path such as my_package.module.Name
segmenter=a..b -> segmenter: 'a..b' is not an import path
segmenter=os.path -> segmenter: 'os.path' is a module; name a callable in it: os.path.Name
segmenter=faulty.NUMBER -> segmenter faulty.NUMBER: is 3, must be callable
segmenter=faulty.NeedsArguments -> faulty.NeedsArguments: given no argument; its parameters are size
segmenter={name: faulty.floats, n: 3} -> faulty.floats: & takes no arguments; given n
segmenter=faulty.RaisesWhenBuilt -> faulty.RaisesWhenBuilt: raised RuntimeError: no such disk
segmenter=faulty.NotCallable -> faulty.NotCallable: an object of NotCallable cannot be called
reward.models=sentimant -> no reward is called 'sentimant'; did you mean 'sentiment'? & keyword
reward.models="" -> reward: no reward is called ''
reward.models=3 -> reward.models: given 3, must be a list or a mapping of keys or a text
reward.models=[length, 3] -> reward.models: given ["length", 3], must be
reward.models=[] -> reward.models: missing; must be a reward's name, a reward model's path
reward.models={target: 3} -> reward: given {'target': 3}, but a mapping needs a `name`
reward.models=[length] -> reward length: given no argument; its parameters are target, unit, scale
reward.models.scael=1 -> reward length: given target, scael; its parameters are target, unit, scale
reward.models.target=x -> reward length: target: given 'x', must be a whole number
reward.models.target=-1 -> reward length: target: given -1, must be at least 0
reward.models.unit=lines -> reward length: unit: given 'lines', must be 'words' or 'characters'
reward.models.weight=x -> weight: given 'x', must be a finite number
reward.models.weight=.nan -> weight: given nan, must be a finite number
reward.models={name: regex, pattern: "["} -> pattern: given '[', not a valid regex: unterminated
reward.models={name: regex, pattern: x, mode: all} -> mode: given 'all', must be 'present', 'count'
reward.models={name: keyword, words: []} -> reward keyword: words: given [], must be a list of words
reward.models={name: keyword, words: nice} -> reward keyword: words: given 'nice', must be a list
reward.models={name: rouge, column: answer} -> needs the column 'answer' & other columns are summary
reward.models={name: rouge, metric: rougeX} -> metric: given 'rougeX', must be 'rouge1'
reward.models={name: embedding_similarity, path: ./nowhere} -> path: given './nowhere'
reward.models={name: embedding_similarity, path: empty_folder} -> reward embedding_similarity: path:
reward.models=not_there.reward -> cannot import 'not_there.reward': No module named 'not_there'
reward.models=faulty.missing -> reward: module 'faulty' has no 'missing'
reward.models=raises_on_import.x -> raised OSError: the disk is on fire
reward.models=faulty.NUMBER -> reward faulty.NUMBER: is 3, must be callable
reward.models={name: faulty.fine, scale: 3} -> faulty.fine: given scale; its parameters are none
reward.models=faulty.by_place -> its parameter 'summary' is given prompts & call the two `prompts`
reward.models=faulty.needs_answer -> needs the column 'answer'; the data's other columns are summary
reward.models=faulty.NotCallable -> reward faulty.NotCallable: an object of NotCallable
reward.models=./nowhere -> reward: given './nowhere', which is not a directory that exists
"""


@pytest.mark.parametrize(("overrides", "fragments"), cases(PLUGINS))
def test_a_wrong_segmenter_or_reward(overrides, fragments, refused):
    line = refused.of(*overrides)
    for fragment in fragments:
        assert fragment in line


RUNNING = """
segmenter=faulty.a_list -> segmenter a_list: returned list, must be a bool tensor
segmenter=faulty.other_shape -> segmenter other_shape: starts has shape (2, 2), must be (4, 
segmenter=faulty.floats -> segmenter floats: starts is torch.float32, must be torch.bool
segmenter=faulty.no_start -> segmenter no_start: the first response token of row 0 is not a start
segmenter=faulty.raises -> segmenter raises: raised KeyError & clauses & (faulty.py, line 19)
segmenter=faulty.Slim -> segmenter Slim(max_length=None): starts has shape (4, 1), must be (4, 
segmenter=faulty.Forgets -> segmenter Forgets: raised RuntimeError: what was it (faulty.py, line
segmenter=faulty.leaves -> segmenter leaves: raised SystemExit: 0 (faulty.py, line
reward.models=faulty.leaves -> reward leaves: row 0 & raised SystemExit: 0 (faulty.py, line
reward.models=faulty.red -> reward red: row 0 & raised ValueError: �[31mred�
segmenter=faulty.takes_nothing -> segmenter faulty.takes_nothing: is called with batch, but its para
reward.models=faulty.too_few -> reward too_few: a batch of 4 rows: returned 1 entries for 4 rows
reward.models=faulty.not_a_list -> reward not_a_list: a batch of 4 rows: returned float
reward.models=faulty.texts -> reward texts: row 0 (prompt ' & returned 'good', must be a number
reward.models=faulty.nans -> reward nans: row 0 & returned nan, must be finite
reward.models=faulty.raises_on_b ;; data.shuffle=false -> row 1 (prompt 'b & Error: no b, please
reward.models=faulty.beyond_the_end -> reward beyond_the_end: row 0 & end_char 99 lies outside
optimizer.learning_rate=1e30 ;; steps=5 ;; optimizer.max_skipped_steps=2 -> training has diverged
"""


@pytest.mark.parametrize(("overrides", "fragments"), cases(RUNNING))
def test_a_plugin_that_fails_in_training(overrides, fragments, refused, tmp_path):
    line = refused.of(*overrides, f"output_dir={tmp_path / 'run'}", weights=True)
    for fragment in fragments:
        assert fragment in line


def test_metrics_so_far_are_written_before_a_reward_fails(refused, tmp_path):
    words = ("reward.models=faulty.fails_later", f"output_dir={tmp_path / 'run'}", "steps=9")
    assert "raised RuntimeError: service is down" in refused.of(*words, weights=True)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("package", "override", "extra"),
    [
        ("vaderSentiment", "reward.models=sentiment", "demo"),
        ("torchmetrics", "reward.models=rouge", "rouge"),
        ("sentence_transformers", "reward.models=embedding_similarity", "embedding"),
        ("wandb", "log.wandb=true", "wandb"),
        ("stanza", "segmenter={name: parsing, parser: stanza}", "stanza"),
        ("tree_sitter", "segmenter=syntax", "code"),
        ("gguf", "model.path=gguf_folder", "gguf"),
    ],
)
def test_a_package_that_is_not_installed(package, override, extra, refused, monkeypatch):
    Path("gguf_folder").mkdir(exist_ok=True)
    Path("gguf_folder/model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)
    line = refused.of(override)
    assert "pip install" in line
    assert f"marlhf[{extra}]" in line


def test_no_arguments_at_all(capfd):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert capfd.readouterr().out.startswith("usage: marlhf JOB CONFIG.yaml")


def python_m_marlhf(folder: Path, *words: str) -> Any:
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "marlhf", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("words", [("ppo", "config.yaml", "stepps=3"), ("ppo", "missing.yaml")])
def test_from_the_shell(words, world):
    done = python_m_marlhf(world, *words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("marlhf: ")


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("ppo", "--help")])
def test_a_closed_pipe_is_no_fault(words):
    """As in `marlhf --help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "marlhf", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("lora", [(), ("model.lora.r=2",)])
def test_only_our_own_lines_are_on_the_terminal(lora, world, tmp_path):
    """Neither notices of other libraries nor their progress bars."""
    words = ("ppo", "config.yaml", f"output_dir={tmp_path}", "log.progress=true", *lora)
    done = python_m_marlhf(world, *words)
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("update 1/1  score ")
