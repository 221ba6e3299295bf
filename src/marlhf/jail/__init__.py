"""The inside of the sandbox: a small server that confines programs and runs them.

`marlhf.rewards.sandbox` starts it in a process of its own, with the standard library alone.
"""
