"""A tiny run, started once a rank: `python two_ranks.py FOLDER SECTIONS_JSON`."""

import json
import sys
from pathlib import Path

import torch
from runs_for_tests import tiny_trainer

from marlhf.config import LoraSettings


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    sections = json.loads(sys.argv[2])
    if "model" in sections:
        sections["model"] = {"lora": LoraSettings(**sections["model"]["lora"])}
    trainer = tiny_trainer(folder, **sections)
    trainer.eval_prompts = list(trainer.stream.prompts[:3])  # an uneven share each
    trainer.train()
    if trainer.distributed.is_main:
        model = trainer.distributed.unwrap(trainer.critic.model) if trainer.critic else None
        torch.save(model.state_dict() if model is not None else {}, folder / "critic.pt")
        (folder / "world_size").write_text(str(trainer.distributed.world_size))


if __name__ == "__main__":
    main()
