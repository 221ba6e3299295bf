"""The formulas of macro-action PPO: no model, no I/O."""
