"""The full pipeline on real text: SFT, a reward model, PPO and macro-action PPO, evaluation.

    python examples/summaries_pipeline.py --data my_summaries.jsonl

The data has rows with a `document` and a human `summary`, at least a few hundred of them. Test rows
are held out; of the others, split by seed, 20% are demonstrations, 40% are for the reward model and
the rest for PPO. Preference pairs need no annotators: the human summary is preferred to a sample of
the fine-tuned model, and to the summary of another document.

Every stage is one `marlhf` command, printed before it runs. Started again, the script resumes where
it stopped. With the default sizes it takes under an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent.parent / "configs"
SEGMENTERS = {"ppo": "token", "ma_ppo": "{name: ngram, n: 5}"}

Row = dict[str, Any]


def main() -> None:
    """Run every stage, and show how the policies compare."""
    args = arguments()
    out: Path = args.out
    split = split_rows(read(args.data), args)
    for name, rows in split.items():
        write(out / "data" / f"{name}.jsonl", rows)

    sft = out / "sft" / "final"
    marlhf(
        sft,
        "sft",
        args.configs / "sft_summaries.yaml",
        f"model.path={args.model}",
        f"data.path={out}/data/sft.jsonl",
        f"data.eval_rows={args.held_out}",
        f"epochs={args.sft_epochs}",
        f"output_dir={out}/sft",
        "resume=auto",
    )
    samples = out / "samples"
    marlhf(
        samples / "results.json",
        "evaluate",
        args.configs / "evaluate_summaries.yaml",
        f"policies={sft}",
        "reference=null",
        "rewards=[]",
        "best_of=[]",
        f"data.path={out}/data/reward.jsonl",
        "data.eval_rows=0",
        "rollout.responses_per_prompt=1",
        f"output_dir={samples}",
    )
    pairs = preference_pairs(split["reward"], read_samples(samples), args.samples_only)
    write(out / "data" / "pairs.jsonl", pairs)
    reward = out / "reward" / "final"
    marlhf(
        reward,
        "reward",
        args.configs / "reward_summaries.yaml",
        f"model.path={sft}",
        f"data.path={out}/data/pairs.jsonl",
        f"data.eval_rows={(1 if args.samples_only else 2) * args.held_out}",
        f"output_dir={out}/reward",
        "resume=auto",
    )
    if args.no_ppo:
        return
    for name, segmenter in SEGMENTERS.items():
        marlhf(
            out / name / "final",
            "ppo",
            args.configs / "ppo_summaries.yaml",
            f"model.path={sft}",
            f"reward.models={reward}",
            f"segmenter={segmenter}",
            f"data.path={out}/data/ppo.jsonl",
            f"steps={args.steps}",
            f"rollout.batch_size={args.batch_size}",
            f"output_dir={out}/{name}",
            "resume=auto",
        )
    policies = ", ".join([f"sft: {sft}", *(f"{name}: {out}/{name}" for name in SEGMENTERS)])
    marlhf(
        out / "evaluation" / "results.json",
        "evaluate",
        args.configs / "evaluate_summaries.yaml",
        f"policies={{{policies}}}",
        f"reference={sft}",
        f"rewards={reward}",
        f"data.path={out}/data/test.jsonl",
        "data.eval_rows=0",
        "rollout.responses_per_prompt=1",
        "best_of=[]",
        f"output_dir={out}/evaluation",
    )
    print((out / "evaluation" / "results.md").read_text(encoding="utf-8"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL: document, summary")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--configs", type=Path, default=CONFIGS, help="where STAGE_summaries.yaml are"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/summaries_pipeline"))
    parser.add_argument("--rows", type=int, default=500, help="rows to use of the data")
    parser.add_argument("--words", type=int, default=60, help="longest document to use, in words")
    parser.add_argument("--first-words", type=int, help="use so many words of each document")
    parser.add_argument("--test-rows", type=int, default=64, help="held out from all training")
    parser.add_argument("--held-out", type=int, default=24, help="held-out rows of SFT and reward")
    parser.add_argument("--sft-epochs", type=float, default=1)
    parser.add_argument("--steps", type=int, default=12, help="PPO updates")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts of a PPO update")
    parser.add_argument("--samples-only", action="store_true", help="no pairs of two documents")
    parser.add_argument("--no-ppo", action="store_true", help="stop after the reward model")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def split_rows(rows: list[Row], args: argparse.Namespace) -> dict[str, list[Row]]:
    """Rows for each stage, none in two of them."""
    if args.first_words:
        rows = [row | {"document": beginning(row["document"], args.first_words)} for row in rows]
    rows = [row for row in rows if len(row["document"].split()) <= args.words]
    random.Random(args.seed).shuffle(rows)
    test, rows = rows[: args.test_rows], rows[args.test_rows : args.test_rows + args.rows]
    first, second = len(rows) // 5, len(rows) * 3 // 5
    parts = {"sft": rows[:first], "reward": rows[first:second], "ppo": rows[second:], "test": test}
    if min(map(len, parts.values())) <= args.held_out:
        sys.exit(f"{args.data}: too few rows of at most {args.words} words for a split")
    return parts


def beginning(text: str, words: int) -> str:
    """The first words of a text, with the white space between them."""
    match = re.match(rf"(?:\s*\S+){{0,{words}}}", text)
    assert match is not None
    return match.group()


def read_samples(folder: Path) -> list[str]:
    """The responses that `marlhf evaluate` wrote, in order of the rows."""
    lines = sorted(read(folder / "samples.jsonl"), key=lambda line: line["row"])
    return [line["response"] for line in lines]


def preference_pairs(rows: list[Row], samples: list[str], samples_only: bool) -> list[Row]:
    """For each document its human summary, preferred to the model's and to another document's."""
    pairs = []
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        for worse in (sample,) if samples_only else (sample, rows[i - 1]["summary"]):
            if worse.strip() and worse.strip() != row["summary"]:
                pair = {"prompt": row["document"], "chosen": row["summary"], "rejected": worse}
                pairs.append(pair)
    return pairs


def marlhf(result: Path, *words: object) -> None:
    """Run a command, unless its result is there; stop where it fails."""
    command = ["marlhf", *map(str, words)]
    if result.exists():
        print(f"# {result} is there", flush=True)
        return
    print("$", *command, flush=True)
    status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if status != 0:
        sys.exit(status)


def read(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: list[Row]) -> None:
    """Rows as a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
