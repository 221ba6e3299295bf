"""A stanza directory with tiny models of its own training: tokenizer, tagger, constituency parser.

Stanza's published models are downloads. These are trained here, by stanza's own trainers, on a
dozen sentences, and lie in a directory of the same layout.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

TREES = [
    "(ROOT (S (NP (DT the) (JJ big) (NN dog)) (VP (VBD chased) (NP (DT a) (JJ small) (NN cat)))"
    " (. .)))",
    "(ROOT (S (NP (DT a) (NN man)) (VP (VBD saw) (NP (DT the) (NN dog))) (. .)))",
    "(ROOT (S (NP (PRP it)) (VP (VBD saw) (NP (DT a) (JJ big) (NN man))) (. .)))",
    "(ROOT (S (NP (DT the) (NN cat)) (VP (VBD chased) (NP (PRP it))) (. .)))",
]
_UPOS = {"DT": "DET", "JJ": "ADJ", "NN": "NOUN", "VBD": "VERB", "PRP": "PRON", ".": "PUNCT"}


def train(folder: Path, language: str = "en") -> Path:
    """Train the three models under `folder/language` and return that path. About ten seconds."""
    logging.getLogger("stanza").setLevel(logging.ERROR)
    home = folder / language
    for kind in ("tokenize", "pos", "pretrain", "constituency"):
        (home / kind).mkdir(parents=True)
    work = folder / "training"
    work.mkdir()
    sentences = [_leaves(tree) for tree in TREES]
    _vectors(sentences, work / "vectors.txt", home / "pretrain" / "tiny.pt")
    _tokenizer(sentences, work, home / "tokenize" / "tiny.pt")
    _tagger(sentences, work, home)
    _parser(work, home)
    pretrain = {"model": "pretrain", "package": "tiny"}
    dependent = {"tiny": {"dependencies": [pretrain]}}
    resources = {
        "tokenize": {"tiny": {}},
        "pos": dependent,
        "constituency": dependent,
        "pretrain": {"tiny": {}},
        "default_processors": {"tokenize": "tiny", "pos": "tiny", "constituency": "tiny"},
        "packages": {
            "default": {"tokenize": "tiny", "pos": "tiny", "constituency": "tiny"},
        },
        "lang_name": "Tiny English",
    }
    (folder / "resources.json").write_text(json.dumps({language: resources}))
    return home


def _leaves(tree: str) -> list[tuple[str, str]]:
    """(tag, word) of each leaf."""
    from nltk.tree import Tree

    return [(tag, word) for word, tag in Tree.fromstring(tree).pos()]


def _vectors(sentences, text: Path, target: Path) -> None:
    from stanza.models.common.pretrain import Pretrain

    words = sorted({word for sentence in sentences for _, word in sentence})
    rows = [
        f"{word} " + " ".join(f"{float(i == j):.1f}" for j in range(len(words)))
        for i, word in enumerate(words)
    ]
    text.write_text(f"{len(words)} {len(words)}\n" + "\n".join(rows) + "\n")
    _ = Pretrain(str(target), str(text)).emb  # reading it writes the file


def _tokenizer(sentences, work: Path, target: Path) -> None:
    from stanza.models import tokenizer

    text = labels = ""
    for sentence in sentences:
        for i, (_, word) in enumerate(sentence):
            space = " " if text and word != "." else ""
            text += space + word
            labels += "0" * len(space + word[1:]) + ("2" if i == len(sentence) - 1 else "1")
    (work / "text.txt").write_text(text + "\n\n")
    (work / "labels.txt").write_text(labels + "\n\n")
    (work / "words.json").write_text("{}")  # no token stands for several words
    tokenizer.main(
        [
            *("--txt_file", str(work / "text.txt"), "--label_file", str(work / "labels.txt")),
            *(
                "--dev_txt_file",
                str(work / "text.txt"),
                "--dev_label_file",
                str(work / "labels.txt"),
            ),
            *("--mwt_json_file", str(work / "words.json")),
            *("--lang", "en", "--shorthand", "en_tiny", "--steps", "150"),
            *("--eval_steps", "1000"),
            *("--emb_dim", "16", "--hidden_dim", "16", "--cpu", "--no_use_mwt"),
            *("--lr0", "0.02", "--dropout", "0", "--unit_dropout", "0", "--max_seqlen", "60"),
            *("--save_dir", str(target.parent), "--save_name", target.name),
        ]
    )


def _tagger(sentences, work: Path, home: Path) -> None:
    from stanza.models import tagger

    blocks = []
    for sentence in sentences * 4:
        lines = [
            f"{i}\t{word}\t_\t{_UPOS[tag]}\t{tag}\t_\t{max(i - 1, 0)}\tdep\t_\t_"
            for i, (tag, word) in enumerate(sentence, 1)
        ]
        blocks.append("\n".join(lines) + "\n\n")
    (work / "tags.conllu").write_text("".join(blocks))
    tagger.main(
        [
            *("--train_file", str(work / "tags.conllu"), "--eval_file", str(work / "tags.conllu")),
            *("--lang", "en", "--shorthand", "en_tiny", "--cpu", "--max_steps", "60"),
            *("--eval_interval", "30", "--hidden_dim", "16", "--char_hidden_dim", "8"),
            *("--deep_biaff_hidden_dim", "16", "--composite_deep_biaff_hidden_dim", "8"),
            *("--word_emb_dim", "8", "--char_emb_dim", "8", "--tag_emb_dim", "8"),
            *("--transformed_dim", "8", "--num_layers", "1", "--no_char", "--dropout", "0"),
            *("--word_dropout", "0", "--lr", "0.02", "--batch_size", "100"),
            *("--wordvec_pretrain_file", str(home / "pretrain" / "tiny.pt")),
            *("--save_dir", str(home / "pos"), "--save_name", "tiny.pt"),
        ]
    )


class _Score:
    """The share of trees that are right, for stanza's F1, which a Java program computes."""

    def __init__(self, f1: float) -> None:
        self.f1, self.treeF1 = f1, f1

    def HasField(self, name: str) -> bool:  # noqa: N802
        return False


class _Scores:
    def process(self, results) -> _Score:
        right = sum(str(result.gold) == str(result.predictions[0].tree) for result in results)
        return _Score(right / len(results))


def _parser(work: Path, home: Path) -> None:
    from stanza.models import constituency_parser
    from stanza.models.common.foundation_cache import FoundationCache
    from stanza.models.constituency import parser_training, tree_reader

    trees = "\n".join(TREES * 4)
    for tag, universal in _UPOS.items():  # as stanza reads them where it has not tagged them itself
        trees = trees.replace(f"({tag} ", f"({universal} ")
    (work / "trees.mrg").write_text(trees)
    args = constituency_parser.parse_args(
        [
            *("--train_file", str(work / "trees.mrg"), "--eval_file", str(work / "trees.mrg")),
            *("--save_dir", str(home / "constituency"), "--save_name", "tiny.pt"),
            *("--wordvec_pretrain_file", str(home / "pretrain" / "tiny.pt"), "--no_retag"),
            *("--charlm_forward_file", "", "--charlm_backward_file", "", "--cpu"),
            *("--lang", "en", "--shorthand", "en_tiny", "--epochs", "8", "--epoch_size", "64"),
            *("--optim", "adamw", "--learning_rate", "0.02", "--stage1_learning_rate", "0.02"),
            *("--word_dropout", "0", "--predict_dropout", "0", "--lstm_layer_dropout", "0"),
            *("--lstm_input_dropout", "0", "--grad_clipping", "1"),
            *("--train_batch_size", "4", "--hidden_size", "16", "--transition_hidden_size", "16"),
            *("--transition_embedding_dim", "8", "--tag_embedding_dim", "8"),
            *("--delta_embedding_dim", "8", "--pattn_num_layers", "0", "--lattn_d_proj", "0"),
        ]
    )
    trees = tree_reader.read_treebank(args["train_file"])
    trainer, sequences, _, transitions = parser_training.build_trainer(
        args, trees, trees, [], FoundationCache(), None
    )
    trainer = parser_training.iterate_training(
        args, trainer, trees, sequences, transitions, trees, [], [], FoundationCache(), _Scores()
    )
    trainer.save(str(home / "constituency" / "tiny.pt"), save_optimizer=False)
