"""The jobs that train: ppo, sft and reward."""
